"""The record of all jobs: a JSON file that is rewritten whenever a result arrives."""

import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcl.bench.gpu.jobs import Job
from jaxcl.bench.gpu.supervise import Outcome
from jaxcl.cost.chips import chip_of

__all__ = ["Record"]

_PRODUCT, _COPY = "bf16 product", "device copy"


class Record:
    """The results so far, which are always on disk.

    Args:
      path: the JSON file; `None` keeps the record in memory only.
      head: facts known before the first measurement.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]):
        self.content: dict[str, Any] = {**head, "machine": {}, "jobs": {}, "results": []}
        self._path = path
        self._write()

    def add(self, job: Job, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Add an event of a job; return the result if the event is one."""
        if event["event"] == "machine":
            facts = {name: value for name, value in event.items() if name != "event"}
            self.content["machine"][job.name] = facts
            self._write()
            return None
        result = {"job": job.name, "part": job.part, "status": event["event"], **event}
        del result["event"]
        if event["event"] == "result":
            result["status"] = "ok"
            result |= self._rates(job, result)
        self.content["results"].append(result)
        self._write()
        return result

    def start(self, job: Job, *, limit_s: float) -> None:
        """Record that a job starts."""
        self.content["jobs"][job.name] = {"part": job.part, "status": "running", "limit_s": limit_s}
        self._write()

    def end(self, job: Job, outcome: Outcome) -> None:
        """Record how a job ended, with its log unless everything succeeded."""
        facts = {"status": outcome.status, "seconds": outcome.seconds}
        failed = any(
            one["job"] == job.name and one["status"] == "failure" for one in self.content["results"]
        )
        if failed or outcome.status != "complete":
            facts["log"] = outcome.log
        self.content["jobs"].setdefault(job.name, {"part": job.part}).update(facts)
        self._write()

    def skip(self, job: Job, why: str) -> None:
        """Record that a job is skipped."""
        self.content["jobs"][job.name] = {"part": job.part, "status": "skipped", "why": why}
        self._write()

    def interrupt(self, why: str) -> None:
        """Record that the command was stopped."""
        self.content["interrupted"] = why
        for job in self.content["jobs"].values():
            if job["status"] == "running":
                job["status"] = "interrupted"
        self._write()

    def failures(self) -> list[dict[str, Any]]:
        """Failed results, except measurements that ran out of time or memory."""
        return [
            one
            for one in self.content["results"]
            if one["status"] == "failure" and one["kind"] not in ("memory", "time")
        ]

    def _rates(self, job: Job, result: Mapping[str, Any]) -> dict[str, Any]:
        """The rates of a result, from its times and work, with their shares of the ceilings."""
        if "ms" in result:
            seconds = statistics.median(result["ms"]) / 1e3
        elif "s" in result:
            seconds = statistics.median(result["s"])
        else:
            return {}
        rates: dict[str, Any] = {}
        if "flops" in result:
            rates["tflops"] = result["flops"] / seconds / 1e12
            rates |= self._share(job, _PRODUCT, "tflops", "share_of_product", rates["tflops"])
            kind = self.content["machine"].get("machine", {}).get("device_kind", "")
            chip = chip_of(kind)
            if chip is not None and not job.on_cpu:
                rates["mfu"] = result["flops"] / seconds / chip.flops
        if "bytes" in result:
            rates["gb_per_s"] = result["bytes"] / seconds / 1e9
            rates |= self._share(job, _COPY, "gb_per_s", "share_of_copy", rates["gb_per_s"])
        for count in ("pairs", "queries"):
            if count in result:
                rates[f"{count}_per_s"] = result[count] / seconds
        return rates

    def _share(self, job: Job, name: str, rate: str, share: str, value: float) -> dict[str, float]:
        """The share of the ceiling that the same framework reached on the same device."""
        source = "machine, PyTorch" if job.needs_torch else "machine"
        ceilings = [
            one[rate]
            for one in self.content["results"]
            if one["job"] == source and one["name"] == name and rate in one
        ]
        if job.on_cpu or not ceilings or job.part == 0:
            return {}
        return {share: value / ceilings[0]}

    def _write(self) -> None:
        if self._path is None:
            return
        part_file = self._path.with_name(f".{self._path.name}.part")
        part_file.write_text(json.dumps(self.content, indent=2) + "\n")
        os.replace(part_file, self._path)
