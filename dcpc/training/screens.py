"""Help screens: the options that people change, and where the others are.

They are text, so that they show at once; the tests compare them with the parser.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HELP_ALL", "OPTIONS", "OVERVIEW", "SUBCOMMANDS", "Option", "help_of"]

HELP_ALL = "--help_all"

SUBCOMMANDS = {
    "fit": "train a Pyro model; logs and checkpoints go to runs/",
    "validate": "measure held-out data as while training",
    "test": "measure held-out data closely: evidence NLL, reconstructions, ...",
    "predict": "write reconstructions and samples of the prior to files",
}

OVERVIEW = """\
Divide-and-conquer predictive coding: trains Pyro models on particles that every
datum keeps.

  dcpc fit     --config configs/digits.json      train; logs go to runs/digits
  dcpc test    --config configs/digits.json      evidence NLL of held-out data
  dcpc predict --config configs/digits.json      reconstructions, samples: files
  tensorboard --logdir runs                      the runs in the browser

  dcpc fit --config configs/mnist.json --config configs/algorithms/pgd.json
                    in layers, later ones over earlier ones; to runs/mnist/pgd
  dcpc fit --config ... --model.num_particles 16 --trainer.max_epochs 5
                    any key of a config, overridden
  dcpc fit --config ... --ckpt_path runs/digits/last.ckpt
                    resume, exactly

Runs go to trainer.default_root_dir, by default runs/<names of the configs>.
test, validate and predict use its last.ckpt, the newest run's checkpoint,
unless --ckpt_path names another one. `dcpc fit --help` shows the options,
`dcpc` alone lists the shipped configs, `dcpc --version` tells the version.
"""

ALL = frozenset(SUBCOMMANDS)
FIT = frozenset(["fit"])


class Option(NamedTuple):
    """A line of a help screen.

    Attributes:
        key: The option, without dashes.
        value: Its value, in a word.
        words: Its meaning.
        default: Its default, where there is one to tell.
        subcommands: The commands that it matters to.
    """

    key: str
    value: str
    words: str
    default: str | None = None
    subcommands: frozenset[str] = ALL


OPTIONS = (
    Option("config", "FILE", "JSON; given again, a layer on top"),
    Option("ckpt_path", "FILE", "checkpoint to resume from, exactly", None, FIT),
    Option("ckpt_path", "FILE", "checkpoint; else the run's last.ckpt", None, ALL - FIT),
    Option("init_from", "FILE", "checkpoint to take the weights of", None, FIT),
    Option("trainer.max_epochs", "N", "epochs, those before a resume too", None, FIT),
    Option("trainer.max_time", "DD:HH:MM:SS", "longest time of it", None, FIT),
    Option("trainer.accelerator", "NAME", "auto, cpu or gpu", "auto"),
    Option("trainer.default_root_dir", "DIR", "folder of the run"),
    Option("model.algorithm", "NAME", "dcpc-smc, pgd, lpc, pc, ipc, ...", "dcpc", FIT),
    Option("model.num_particles", "N", "particles per datum", "4", FIT),
    Option("model.learning_rate", "X", "of Adam, on the parameters", "0.001", FIT),
    Option("model.held_out.num_particles", "N", "particles per held-out datum", "16", ALL - FIT),
    Option("model.held_out.test_temperatures", "N", "length of annealing", "400", ALL - FIT),
    Option("data.path", "PATH", "of HubImages: hub's name, or a folder"),
    Option("data.batch_size", "N", "training data per step", None, FIT),
    Option("data.evaluation_batch_size", "N", "held-out data at once", None, ALL - FIT),
    Option("seed_everything", "N", "seed of weights and training", "0"),
    Option("num_threads", "N", "threads of torch on the CPU"),
)

EXAMPLES = {
    "fit": (
        "dcpc fit --config configs/digits.json",
        "dcpc fit --config configs/mnist.json --config configs/algorithms/pgd.json",
        "dcpc fit --config configs/digits.json --ckpt_path runs/digits/last.ckpt",
    )
}

REST = """\
Any other key of a config is an option too, with dots. The whole list:

  dcpc {0} --help_all
  dcpc {0} --model.help ParticleModule    below "model", of this class (or
          AmortisedModule, ClassifierModule)
  dcpc {0} --data.help HubImages          below "data", of this class (or
          DigitsData, ArrayData, NamedArrayData, HalfLabelledData, ...)
  dcpc {0} --config ... --print_config    the config in full

`dcpc` alone lists the shipped configs; configs/README.md in the repository
explains them, and every key."""


def help_of(subcommand: str) -> str:
    """The help screen of a command."""
    examples = EXAMPLES.get(subcommand, (f"dcpc {subcommand} --config configs/digits.json",))
    lines = [_line(option) for option in OPTIONS if subcommand in option.subcommands]
    parts = [
        f"dcpc {subcommand}: {SUBCOMMANDS[subcommand]}",
        "\n".join(f"  {example}" for example in examples),
        "\n".join(lines),
        REST.format(subcommand),
    ]
    return "\n\n".join(parts)


def _line(option: Option) -> str:
    default = "" if option.default is None else f" [{option.default}]"
    return f"  {f'--{option.key} {option.value}':<38} {option.words}{default}"
