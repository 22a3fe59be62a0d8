"""Options of ``bnpatch tune-alpha``: how to search, and what is judged by which images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from .options import panel

if TYPE_CHECKING:
    from bnpatch.search.config import SearchConfig

_search, _verdict = panel("Search"), panel("Verdict and calibration")


@dataclass(frozen=True)
class Judging:
    """Options that say which images give the verdict, and which ones a patch must not harm."""

    holdout: Annotated[
        float | None,
        _verdict(
            help="Part of the data that gives the verdict, unseen by the search. Default: 0.5, or in turns "
            "where images are few."
        ),
    ] = None
    test_data: Annotated[
        str | None, _verdict(help="Other data for the verdict; --data is all for tuning.")
    ] = None
    calib_data: Annotated[
        str | None,
        _verdict(help="Images to re-estimate statistics on, labels unused. Default: those to tune on."),
    ] = None
    keep_data: Annotated[
        str | None,
        _verdict(
            help="Images that a patch must not harm, labelled or not, e.g. the original validation set."
        ),
    ] = None
    margin: Annotated[
        float,
        _verdict(
            help="The loss that is accepted on --keep-data: of accuracy or, without labels, of answers."
        ),
    ] = 0.005
    fail_unless_gain: Annotated[
        bool,
        _verdict(
            "--fail-unless-gain",
            help="Exit with 1 unless held-out images support a patch. The files are written all the same.",
        ),
    ] = False


@dataclass(frozen=True)
class Searching:
    """What to search for, and for how long."""

    metric: Annotated[
        str,
        _search(
            help="accuracy, cross-entropy or top5; without labels unlabeled (for comparison: information, "
            "alignment, entropy, evalnorm)."
        ),
    ] = "accuracy"
    granularity: Annotated[
        Literal["auto", "global", "stage", "layer"],
        _search(help="What has weights of its own: the model, each stage, each layer; auto tries both ends."),
    ] = "auto"
    recalibrate: Annotated[
        bool | None,
        _search(
            "--recalibrate/--no-recalibrate",
            help="Let re-estimated running statistics join. Default: with --granularity auto.",
        ),
    ] = None
    slopes: Annotated[
        bool,
        _search(
            "--slopes/--no-slopes",
            help="Let the weight of an example depend on how far it is from the running statistics, and "
            "differ between its mean and its variance.",
        ),
    ] = True
    trials: Annotated[int | None, _search(help="At most so many weights in each global search.")] = None
    max_passes: Annotated[
        float, _search(help="At most so many passes over the images in each global search.")
    ] = 3.0
    timeout: Annotated[float | None, _search(help="Begin nothing more after so many seconds.")] = None
    max_overhead: Annotated[
        float | None,
        _search(help="Patch only as much as keeps the measured latency within so many times the original's."),
    ] = None
    augment: Annotated[
        str | None,
        _search(
            help="Tune for shifts that are not in the data: any of contrast,brightness,noise,blur, and of "
            "the standard corruptions (fog, frost, snow, ...: pip install 'bnpatch\\[robustness]')."
        ),
    ] = None
    class_prior: Annotated[
        str | None,
        _search(
            help="With --metric unlabeled or information: how often the classes occur, e.g. 0.7,0.2,0.1. "
            "Default: equally."
        ),
    ] = None
    recover_fused: Annotated[
        bool,
        _search(
            "--recover-fused",
            "--recover-folded",  # its earlier name
            help="Find again the Batch Norm that was fused into convolutions (--calib-data: clean images).",
        ),
    ] = False
    storage: Annotated[
        str | None,
        _search(
            help="Keep the trials in a database, e.g. sqlite:///x.db: the same command goes on after a kill."
        ),
    ] = None
    study: Annotated[str | None, _search(help="Name of the study in the storage.")] = None
    log: Annotated[
        str | None,
        _search(
            metavar="tensorboard|mlflow|wandb",
            help="Also write each trial of the global searches to a tracker: TensorBoard's files are in "
            "OUTPUT/tensorboard, the others write where their own settings say.",
        ),
    ] = None

    def config(self, judging: Judging, batch_size: int, output: Path) -> "SearchConfig":
        """Return the library's settings, which are checked when they are made; results go to ``output``."""
        from bnpatch.search.config import SearchConfig
        from bnpatch.search.trackers import tracker

        callbacks = [] if self.log is None else [tracker(self.log, self.metric, output / self.log)]

        return SearchConfig(
            recalibrate=self.recalibrate,
            slopes=self.slopes,
            trials=self.trials,
            max_passes=self.max_passes,
            holdout=judging.holdout,
            class_prior=self.class_prior,
            augment=self.augment,
            margin=judging.margin,
            max_overhead=self.max_overhead,
            recover_fused=self.recover_fused,
            batch_size=batch_size,
            storage=self.storage,
            study=self.study,
            callbacks=callbacks,
        )
