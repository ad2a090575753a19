"""Losses with options, which only a config file can set: for the golden runs."""

from ml_collections import ConfigDict

from jaxcl.configs import code_search

OPTIONS = {
    "running_estimate": (
        "running_estimate",
        {"temperature_rate": 0.1, "robustness": 6.5, "update_rate": 0.8},
    ),
    "hard": ("hard", {"concentration": 0.7, "positive_share": 0.02}),
    "joint": (
        "infonce",
        {
            "directions": ("query_to_key", "key_to_query", "query_to_query", "key_to_key"),
            "partition": "joint",
            "hardness": 2.0,
        },
    ),
}


def get_config(variant: str) -> ConfigDict:
    """`code_search.get_config("plain")` with one of `OPTIONS`."""
    config = code_search.get_config("plain")
    config.loss.name, options = OPTIONS[variant]
    config.loss.options = ConfigDict(options)
    return config
