"""The configs that come with jaxcl, as `jaxcl.configs.NAME`.

Their sources are in the folder `configs` of the repository. A built wheel has them here; in a
checkout, this package finds them there.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).parents[2] / "configs"
if not (Path(__file__).parent / "base.py").exists() and (_CHECKOUT / "base.py").exists():
    __path__.append(str(_CHECKOUT))
