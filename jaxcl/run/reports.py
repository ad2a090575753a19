"""Report the metrics of a run while it trains, and end it if it diverges."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.cost.utilization import model_flops, peak_flops
from jaxcl.data.modalities import modality_of
from jaxcl.host.command import UserError
from jaxcl.host.progress import say
from jaxcl.run.metric_writer import MetricWriter
from jaxcl.run.training import Training
from jaxcl.settings.sections import Settings
from jaxcl.step.train_state import TrainState
from jaxcl.step.train_step import StepMetrics
from jaxcl.typing import SIDES, PyTree, Scalar

__all__ = ["DivergenceError", "Reports"]

_CHECK_MASKS = "Check loss.masks, the margins and the groups of the data (shown only once)"


class DivergenceError(UserError):
    """The loss, its gradient or a parameter is not finite."""


class Reports:
    """Read the metrics of each step one step late, so that the devices never wait for the host.

    Reading metrics in every step also limits the number of steps in flight. Otherwise the
    collectives of many simulated devices on a few cores can deadlock.
    """

    def __init__(
        self,
        training: Training,
        writer: MetricWriter,
        advance: Callable[..., None],
    ):
        settings = training.settings
        self._settings, self._training = settings, training
        self._writer, self._advance = writer, advance
        self._unread: collections.deque[tuple[int, StepMetrics]] = collections.deque()
        self._rate = math.nan
        self._peak_flops = peak_flops(training.mesh.devices.ravel().tolist())
        has_peak = self._peak_flops is not None
        flops = model_flops(settings, training.towers, frozen=training.frozen) if has_peak else 0.0
        self._model_flops = flops
        self._full_length = settings.global_batch_size * sum(
            modality_of(settings.data, side).length(settings.data, side) for side in SIDES
        )
        self._learning_rates = _RatesByStep(training.learning_rate)
        self._warned = False
        self._restart_clock(time.perf_counter())

    def add(self, step: int, metrics: StepMetrics, *, input_seconds: float = 0.0) -> None:
        """Add the metrics of a step, and read those of the previous step.

        Args:
          step: the step.
          metrics: the metrics of the step, still on the device.
          input_seconds: seconds that the step waited for its batch.
        """
        self._input_seconds += input_seconds  # counted now, although the step is read later
        self._unread.append((step, metrics))
        if len(self._unread) > 1:
            self._read(*self._unread.popleft())

    def flush(self) -> None:
        """Read the metrics of all steps so far."""
        while self._unread:
            self._read(*self._unread.popleft())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Read the metrics of all steps so far, and leave the time in this context out of rates."""
        self.flush()
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def check_negatives(self, step: int, measured: Mapping[str, float]) -> None:
        """Warn if the metrics of the negatives in a batch show that no negatives are allowed."""
        counts = [value for name, value in measured.items() if name.endswith("/counted")]
        if counts and not any(counts) and not self._warned:
            self._warned = True
            say(f"warning: no negative is allowed in the batch of step {step}. {_CHECK_MASKS}")

    def check(self, step: int, state: TrainState) -> None:
        """Raise a `DivergenceError` unless every parameter is finite.

        The metrics of the step do not show this, since its loss was computed before its update.
        """
        finite = jax.device_get(_finite_leaves(state.params))
        names = _names_of_false(finite)
        if names:
            raise DivergenceError(
                f"step {step} diverged: after its update {', '.join(names)} are not finite. "
                f"{_advice(self._settings)}"
            )

    def _step_seconds(self, seconds: float) -> dict[str, float]:
        """The mean time per step since the last report, for batches, devices and the host."""
        host = seconds - self._input_seconds - self._device_seconds
        parts = {"input": self._input_seconds, "device": self._device_seconds, "host": host}
        return {f"time/step_{part}_seconds": s / self._steps_since for part, s in parts.items()}

    def _utilization(self, seconds: float) -> dict[str, float]:
        """The share of the peak FLOP/s of the devices that the model uses, if the peak is known."""
        if self._peak_flops is None or not self._model_flops:
            return {}
        # The FLOPs of the model are those of a batch padded to the longest text.
        computed = self._padded_length / (self._steps_since * self._full_length)
        rate = computed * self._model_flops * self._steps_since / seconds
        return {"time/model_flop_utilization": rate / self._peak_flops}

    def _restart_clock(self, now: float) -> None:
        self._since, self._steps_since = now, 0
        self._input_seconds = self._device_seconds = 0.0
        self._length = self._padded_length = 0

    def _read(self, step: int, metrics: StepMetrics) -> None:
        start = time.perf_counter()
        loss, gradient_norm = float(metrics.loss), float(metrics.gradient_norm)
        self._device_seconds += time.perf_counter() - start
        if not np.isfinite([loss, gradient_norm]).all():
            raise DivergenceError(_diagnosis(step, metrics, self._training))
        if gradient_norm == 0 and not self._warned:
            self._warned = True
            say(
                f"warning: the gradient of step {step} is 0, so the step has no effect: its rows "
                f"have no allowed negatives, or none that the loss uses. {_CHECK_MASKS}"
            )
        self._steps_since += 1
        self._length += int(metrics.length)
        self._padded_length += int(metrics.padded_length)
        if step % self._settings.run.log_every == 0 or step == self._settings.steps:
            now = time.perf_counter()
            seconds = now - self._since
            self._rate = self._steps_since * self._settings.global_batch_size / seconds
            self._writer.write(
                step,
                {
                    "loss": loss,
                    "gradient_norm": gradient_norm,
                    "temperature": float(metrics.temperature),
                    "learning_rate": self._learning_rates(step - 1),
                    "time/pairs_per_second": self._rate,
                    "time/tokens_per_second": self._length / seconds,
                    "padding": 1 - self._length / max(self._padded_length, 1),
                    **self._step_seconds(seconds),
                    **self._utilization(seconds),
                },
            )
            self._restart_clock(now)  # so that the next report includes the time for writing
        rate = "" if math.isnan(self._rate) else f" · {self._rate:,.0f} pairs/s"
        self._advance(1, f"loss {loss:.3f}{rate}")


class _RatesByStep:
    """The learning rate of each step.

    Many rates are computed at once, since each computation waits for the step in flight.
    """

    _COUNT = 65_536

    def __init__(self, learning_rate: Callable[[Any], Scalar]):
        self._rates_of = jax.vmap(learning_rate)
        self._first, self._rates = -1, np.zeros(0)

    def __call__(self, step: int) -> float:
        first = step - step % self._COUNT
        if first != self._first:
            steps = first + jnp.arange(self._COUNT, dtype=jnp.int32)
            self._first, self._rates = first, np.asarray(self._rates_of(steps))
        return float(self._rates[step - first])


def _diagnosis(step: int, metrics: StepMetrics, training: Training) -> str:
    finite = jax.tree.map(np.isfinite, jax.device_get(metrics.leaf_gradient_norms))
    return (
        f"step {step} diverged: loss {float(metrics.loss)}, gradient norm "
        f"{float(metrics.gradient_norm)}, not finite for "
        f"{', '.join(_names_of_false(finite)) or 'no parameter'}; temperature "
        f"{float(metrics.temperature):.4f}, learning rate "
        f"{float(training.learning_rate(step - 1)):.2e}. {_advice(training.settings)}"
    )


def _advice(settings: Settings) -> str:
    return (
        "Earlier checkpoints are kept. Try a lower optimizer.learning_rate (now "
        f"{settings.optimizer.learning_rate}) or optimizer.clip_norm (now "
        f"{settings.optimizer.clip_norm}), or a higher loss.temperature.minimum (now "
        f"{settings.loss.temperature.minimum}), in another --workdir"
    )


def _names_of_false(tree: PyTree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, value in leaves if not value]


@jax.jit
def _finite_leaves(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)
