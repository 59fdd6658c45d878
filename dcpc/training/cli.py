"""What the `dcpc` command runs: Lightning's command line with JSON configs."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
import torch.distributed as distributed
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.multiprocessing import ProcessRaisedException

from dcpc.errors import DCPCError, OptionError
from dcpc.training.callbacks import (
    CalibrationCurve,
    EvaluationTable,
    HeldOutTables,
    ImageGrids,
    PredictionWriter,
    RunCheckpoint,
    RunProgress,
    RunReport,
    SweepMonitor,
)
from dcpc.training.checkpoint import (
    DurableFiles,
    check_parameters,
    load_initial_weights,
    read_checkpoint,
)
from dcpc.training.data import LabelledData
from dcpc.training.logger import RunLogger, SaveConfig
from dcpc.training.modules import (
    MeasuredModule,
    ParticleModule,
)
from dcpc.training.modules.base import STATE_KEY
from dcpc.training.parser import ConfigParser, Threads, fail, narrow_types
from dcpc.training.paths import local_path
from dcpc.training.processes import is_first_process, is_first_to_fail, let_others_fail
from dcpc.training.refusals import refusal
from dcpc.training.screens import OVERVIEW
from dcpc.training.signals import Signals

__all__ = ["ConfiguredCLI", "TrainingCLI", "one_line_errors", "run"]

REFUSALS = (TypeError, ValueError, ImportError, MisconfigurationException)
"""Errors of constructors that got what they cannot use."""

LOST_PROCESS = re.compile("Connection (closed|reset) by peer|NCCL|gloo", re.IGNORECASE)
"""Errors of torch where another process of a training does not answer any more."""

REFUSED_ELSEWHERE = re.compile(r"^dcpc\.[\w.]+Error: (?P<message>.+)\s*\Z", re.MULTILINE)
"""End of the traceback of a process that has refused something."""

LIGHTNING_PARTS = {
    "pytorch_lightning.callbacks.": "trainer.callbacks",
    "pytorch_lightning.loops.": "trainer",
    "pytorch_lightning.trainer.": "trainer",
}
"""Modules whose errors are about options, and the keys of these."""

LIGHTNING_REMARKS = (
    ".*does not have many workers",
    ".*configure_optimizers` will be overridden",
    ".*LeafSpec.* is deprecated",
    ".*callbacks used to create the checkpoint need to be provided",
    ".*Checkpoint directory .* exists and is not empty",
    ".*The dirpath has changed from",
    "GPU available but not used",
    r"\s*By default only one JsonargparseDeprecationWarning",
    r"(?s).* was deprecated in v4\.\d+\.\d+ and will\s+be\s+removed\s+in\s+v5",
)
"""Warnings that are about Lightning's own doings, or that do not apply to `dcpc`."""


class TrainingCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` for a `MeasuredModule` on `LabelledData`.

    A config's `model` that names no class holds the arguments of `ParticleModule`.

    Args:
        args: Arguments of the command line; None for the process's own.
        signals: Signals that stop training; None to leave them to others.

    Raises:
        DCPCError: An option, the data, a checkpoint or a folder is unusable.
    """

    def __init__(self, args: Sequence[str] | None = None, signals: Signals | None = None) -> None:
        self.signals = signals
        self.num_batches = 0  # that the checkpoint had learned from
        self._steps_before: int | None = None
        _quieten_lightning()
        super().__init__(
            MeasuredModule,
            LabelledData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"config_filename": "config.json", "overwrite": True},
            trainer_defaults={
                "default_root_dir": None,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "enable_progress_bar": None,
            },
            seed_everything_default=0,
            parser_class=ConfigParser,
            parser_kwargs={"description": OVERVIEW},
            args=None if args is None else list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the number of threads, which Lightning leaves to the environment."""
        narrow_types(parser)
        module = ParticleModule
        parser.set_defaults(model={"class_path": f"{module.__module__}.{module.__name__}"})
        parser.add_argument(
            "--num_threads",
            type=Threads | None,
            default=None,
            help="Threads of torch on the CPU; 1 is fastest for small models. null: torch's choice",
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--init_from",
                type=str | None,
                default=None,
                help="Checkpoint, or file of `checkpoints/`, of which the weights alone are taken: "
                "optimiser, particles and epochs start afresh",
            )
        return parser

    def before_instantiate_classes(self) -> None:
        """Sets what the whole process has one of: threads, and how convolutions are computed.

        By default a GPU rounds their factors to TF32, ten binary digits, and may sum them in
        another order every time: densities would be off, and runs would not resume bit for bit.
        """
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        num_threads = self.config[self.subcommand].num_threads
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and checks what can be checked before anything is built."""
        self.config = parser.parse_args(args)
        options = self.config[self.config.subcommand]
        if options.trainer.barebones:
            raise OptionError(
                "trainer.barebones: expected false, got true: it refuses logs, checkpoints and "
                "progress bars, without which dcpc keeps and shows nothing; switch off what you "
                "do not need by trainer.logger and trainer.enable_checkpointing"
            )
        given = options.trainer.default_root_dir or _run_folder(options.config or [])
        folder = local_path("trainer.default_root_dir", given)
        options.trainer.default_root_dir = str(folder)
        _check_writable(folder)
        if self.config.subcommand != "fit" and options.ckpt_path is None:
            options.ckpt_path = str(folder / "last.ckpt")
        if self.config.subcommand in ("validate", "test"):
            options.verbose = False  # the table of EvaluationTable takes the place of Lightning's
        if self.config.subcommand == "fit" and options.init_from is not None:
            if options.ckpt_path is not None:
                raise OptionError(
                    "--init_from starts a run from weights, and --ckpt_path goes on with one; give "
                    "one of them (--init_from null, where a config sets it)"
                )
            options.init_from = str(local_path("--init_from", options.init_from))
        if options.ckpt_path is not None:
            options.ckpt_path = str(local_path("--ckpt_path", options.ckpt_path))
            options.weights_only = True
            saved = read_checkpoint(options.ckpt_path).get(STATE_KEY, {})
            self.num_batches = saved.get("num_steps", 0)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except REFUSALS as error:
            raise refusal(error, self.config[self.subcommand]) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer whose logs and checkpoints go below `trainer.default_root_dir`."""
        options = self.config[self.subcommand].trainer
        callbacks: list[Callback]
        if self.subcommand == "fit":
            monitor = SweepMonitor(options.log_every_n_steps or 50)
            callbacks = [monitor, ImageGrids(), CalibrationCurve(), HeldOutTables(), RunReport()]
            if options.enable_checkpointing is not False:
                callbacks.append(RunCheckpoint(self.signals))
            if options.logger in (None, True):
                kwargs["logger"] = RunLogger(
                    options.default_root_dir, self.config.fit.ckpt_path, self.num_batches
                )
        else:
            is_prediction = self.subcommand == "predict"
            callbacks = [PredictionWriter()] if is_prediction else [EvaluationTable()]
            if self.subcommand == "test":
                callbacks.append(CalibrationCurve())
            kwargs["logger"] = False
            kwargs["enable_checkpointing"] = False
        shows_progress = options.enable_progress_bar
        if shows_progress is None:
            shows_progress = kwargs["enable_progress_bar"] = sys.stdout.isatty()
        configured = self._get(self.config_init, "trainer")
        plugins = _as_list(configured.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(DurableFiles())
        callbacks += _as_list(configured.callbacks)
        if shows_progress and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RunProgress())
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def after_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        if options.ckpt_path is not None:
            checkpoint = read_checkpoint(options.ckpt_path)
            if self.subcommand == "fit":
                self.model.check_settings(checkpoint)
                self._check_epochs(checkpoint.get("epoch", 0))
                self._steps_before = checkpoint.get("global_step")
            check_parameters(checkpoint, self.model, options.ckpt_path)
        if self.subcommand == "fit" and options.init_from is not None:
            parts = load_initial_weights(options.init_from, self.model)
            if is_first_process():
                print(f"weights of {' and '.join(parts)} from {options.init_from}")
                advice = self.model.advice_with_initial_weights()
                if advice:
                    print(advice)

    def _check_epochs(self, epoch: int) -> None:
        """Refuses to resume a run that has trained for longer already, which Lightning words so."""
        most = self.trainer.max_epochs
        if most is not None and 0 <= most < epoch:
            raise OptionError(
                f"trainer.max_epochs: the checkpoint has trained for more than {epoch} epochs, got "
                f"{most}; the number counts from the first epoch of the run: give a larger one"
            )

    def before_fit(self) -> None:
        """Measures the untrained model, so that learning shows."""
        if self.config.fit.ckpt_path is None and self.trainer.limit_val_batches:
            logger = self.trainer.logger
            told = logger.without_curves() if isinstance(logger, RunLogger) else nullcontext()
            with told:
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def after_fit(self) -> None:
        """Measures the trained model, unless its last epoch was measured."""
        report = next(c for c in self.trainer.callbacks if isinstance(c, RunReport))  # type: ignore[attr-defined]
        if report.is_outdated and self.trainer.limit_val_batches:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        report.compare(self.trainer)
        if not self.trainer.is_global_zero:
            return
        if self.trainer.global_step == self._steps_before:
            print(
                "nothing was trained: the checkpoint is at the end of the run already; raise "
                "trainer.max_epochs, max_steps or max_time to go on"
            )
        elif self.trainer.checkpoint_callback is not None:
            print(
                "next, with the same --config: dcpc predict draws pictures, dcpc test measures "
                f"closely; curves: tensorboard --logdir {self.config.fit.trainer.default_root_dir}"
            )


class ConfiguredCLI(TrainingCLI):
    """Objects that a config names, built as `model`, `datamodule` and `trainer` without a run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def run(arguments: Sequence[str]) -> None:
    """Runs a command of `dcpc`; errors as by `one_line_errors`."""
    with one_line_errors(), Signals() as signals:
        TrainingCLI(arguments, signals)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Makes bad input one line on standard error and exit status 2, for a command's whole run.

    The death of another process is one line too, and exit status 1. Of several processes, the
    first that fails speaks for all.
    """
    try:
        yield
    except ProcessRaisedException as error:  # of a process that was forked or spawned
        refused = REFUSED_ELSEWHERE.search(str(error))
        if refused is None:
            raise
        fail(refused["message"])
    except RuntimeError as error:
        _fail_if_lightning_refuses(error)
        if not (distributed.is_initialized() and LOST_PROCESS.search(str(error))):
            raise
        if is_first_to_fail() is False:
            raise SystemExit(1) from error
        fail("another process of this training has died; go on from last.ckpt", status=1)
    except (DCPCError, OSError, MisconfigurationException) as error:
        if not is_first_to_fail():
            raise SystemExit(2) from error
        print(f"dcpc: error: {error}", file=sys.stderr)
        let_others_fail()
        raise SystemExit(2) from error
    except ValueError as error:
        _fail_if_lightning_refuses(error)
        raise


def _fail_if_lightning_refuses(error: BaseException) -> None:
    """Fails in one line where Lightning refuses an option that it has looked at too late.

    That is a callback whose metric does not exist, for example.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__"))
    key = next((key for begin, key in LIGHTNING_PARTS.items() if module.startswith(begin)), None)
    if key is not None:
        fail(f"{key}: {' '.join(str(error).split())}")


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _run_folder(layers: Sequence[Any]) -> Path:
    """The folder of a run: `runs`, and below it the names of its configs."""
    return Path("runs", *(Path(str(layer)).stem for layer in layers))


def _quieten_lightning() -> None:
    for library in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for remark in LIGHTNING_REMARKS:
        warnings.filterwarnings("ignore", remark)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OptionError(
            f"trainer.default_root_dir: cannot write to the folder '{folder}' ({error.strerror}); "
            "choose another one"
        ) from error
