"""`--help` and `--version` of the programs. They answer at once, without importing TensorFlow."""

import importlib.metadata
import os
import textwrap
from collections.abc import Sequence
from types import ModuleType

from absl import flags

_HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort")
_VERSION = ("--version", "-version")


def program(command: Sequence[str]) -> str:
    """Returns the name of this package's program that a command line, `sys.orig_argv`, runs, else an empty string."""
    for position, word in enumerate(command[1:], 1):
        if word == "-m" or not word.startswith("-"):
            name = command[position + 1] if word == "-m" and position + 1 < len(command) else os.path.basename(word)
            return name if name.startswith(("s2sd-", "s2sd_tf.cli.")) else ""
    return ""


def answers(arguments: Sequence[str]) -> bool:
    """Whether the arguments contain a flag that `text` answers."""
    return any(argument in _HELP + _VERSION for argument in arguments)


def text(module: ModuleType, arguments: Sequence[str]) -> str:
    """Returns the answer to `--help` or `--version` of the program that `module` defines."""
    if any(argument in _VERSION for argument in arguments):
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tensorflow", "keras"))
        return f"s2sd_tf {importlib.metadata.version('s2sd_tf')} ({versions})"
    # Required ones first.
    listed = sorted(flags.FLAGS.get_key_flags_for_module(module), key=lambda flag: not _is_required(flag))
    return "\n".join([(module.__doc__ or "").strip(), "", "Flags:", *(_describe(flag) for flag in listed)])


def _is_required(flag):
    return any("other than None" in validator.message for validator in flag.validators)


def _describe(flag):
    values = "|".join(getattr(flag.parser, "enum_values", None) or ())
    # absl says both itself.
    about = flag.help.removeprefix(f"<{values}>: ").partition(";\n    repeat this option")[0]
    name = f"  --{'[no]' if flag.boolean else ''}{flag.name}{f'={values}' if values else ''}"
    if _is_required(flag):
        note = " Required."
    elif flag.default in (None, []):
        note = ""
    else:
        note = f" Default: {flag.default_as_str.strip(chr(39))}."
    return name + "\n" + textwrap.indent(textwrap.fill(about + note, 112), "      ")
