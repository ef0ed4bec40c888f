"""The three logs of a run as one: what they hold at a step, cut back to a checkpoint, appended to by rank 0 alone."""

from train import distributed, metrics, samples
from train.metrics import Log, Record, Sink
from train.run_folder import RunFolder


class Logs:
    """metrics.jsonl, anomalies.jsonl and samples.jsonl.

    `evaluated` and `sampled` are the last steps whose evaluation and samples are there, 0 for none.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._open: list[Log] = []
        self.sinks: list[Sink] = []  # whom metrics are also shown to
        self.evaluated = self.sampled = 0

    def examine(self, step: int, anomalies: int) -> None:
        """Look what is there up to `step`. ValueError when a line is not that a checkpoint at `step` covers.

        It covers the train lines 1 ... step and `anomalies` lines of anomalies; evaluations and samples can be made
        again. What stands behind `step` does not matter.
        """
        lines = [line for line in metrics.undamaged(self._folder.metrics) if line["step"] <= step]
        trained = [line["step"] for line in lines if line["kind"] == "train"]
        recorded = sum(line["step"] <= step for line in metrics.undamaged(self._folder.anomalies))
        for log, whole in (
            (self._folder.metrics, trained == list(range(1, step + 1))),
            (self._folder.anomalies, recorded == anomalies),
        ):
            if not whole:
                raise ValueError(
                    f"{log}: lines up to step {step}, which the checkpoint covers, are missing or damaged; "
                    "copy the file back, or give --restart to start anew"
                )
        self.evaluated = max((line["step"] for line in lines if line["kind"] == "eval"), default=0)
        self.sampled = samples.last_complete(self._folder.samples, step)

    def open(self, step: int) -> None:
        """Cut the logs back to `step`, tails going to discarded/, and append to them from now on."""
        if not distributed.is_writer():
            return
        f = self._folder
        sampled = step if self.sampled == step else step - 1  # half of a step's samples are made again whole
        for path, end in ((f.metrics, step), (f.anomalies, step), (f.samples, sampled)):
            metrics.cut(path, lambda line, end=end: line["step"] <= end, f.discarded)  # type: ignore[misc]
        self._open = [Log(path) for path in (f.metrics, f.anomalies, f.samples)]

    def metric(self, record: Record) -> None:
        self._append(0, record)
        for sink in self.sinks:
            sink.add(record)

    def anomaly(self, record: Record) -> None:
        self._append(1, record)

    def sample(self, record: Record) -> None:
        self._append(2, record)

    def sync(self) -> None:
        """Make all lines so far durable."""
        for log in self._open:
            log.sync()
        for sink in self.sinks:
            sink.sync()

    def close(self) -> None:
        for log in self._open:
            log.close()
        for sink in self.sinks:
            sink.close()
        self._open = []

    def _append(self, which: int, record: Record) -> None:
        if self._open:
            self._open[which].append(record)
