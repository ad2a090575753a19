"""Runs a command: parses its flags, reports its errors and sets its exit code.

A command's module defines `main`, which declares the flags and calls `run_command`:

    def main(argv: Sequence[str] | None = None) -> None:
        parser = CommandParser("jaxcl.search", __doc__)
        parser.add_argument("--top", type=int, default=10, help="hits to show")
        run_command(parser, _run, argv)

The command exits with

    0        on success, even if the reader of the output leaves early, as `| head -1` does
    1        after an error: one line if the user can fix it, otherwise a traceback
    2        for flags that cannot be parsed
    75       because another process of the run was lost; restart all of them
    130      after Ctrl-C; a second Ctrl-C ends the process at once
    128 + n  after signal n, once the run is saved
"""

import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TypeVar

from absl import logging

from jaxcl.host.command_flags import CommandParser
from jaxcl.host.huge_pages import start_with_huge_pages
from jaxcl.host.output import print_traceback, protect_output
from jaxcl.host.paths import AnyPath
from jaxcl.host.processes import Stopped, catch_interrupt, leave, leave_for, start_processes
from jaxcl.host.progress import say
from jaxcl.host.user_folders import ensure_home

__all__ = ["UserError", "join_processes", "run_command"]

T = TypeVar("T")


class UserError(RuntimeError):
    """An error that the user can fix, which a command prints as one line."""


def run_command(
    parser: CommandParser,
    run: Callable[[Namespace], T],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
    trains: bool = False,
) -> T:
    """Parse the flags and run a command; this module's docstring lists the exit codes.

    Args:
      parser: the parser of the command's flags.
      run: the command itself.
      argv: the arguments; `None` takes this process's arguments.
      interrupted: the message to print after Ctrl-C.
      trains: whether to restart the process with huge pages, if `argv` is `None`.

    Returns:
      The result of `run`.
    """
    protect_output()
    ensure_home()
    arguments = parser.parse(argv)
    if trains and argv is None:
        start_with_huge_pages()
    if argv is None:
        catch_interrupt()
    logging.set_verbosity(logging.WARNING)  # libraries log a lot at INFO
    try:
        return run(arguments)
    except Stopped as stopped:
        say(str(stopped))
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        say(interrupted)
        leave(128 + signal.SIGINT, at_once=argv is None)
    except (ValueError, OSError, UserError) as error:
        if arguments.verbose:
            print_traceback(error)
        say("error: " + re.sub(r"\s*\n\s*", " ", str(error)))
        leave(1)
    except Exception as error:  # of any class: other processes must not wait for this one
        leave_for(error, verbose=arguments.verbose)


def join_processes(arguments: Namespace, workdir: AnyPath) -> None:
    """Join the other processes of a run, as given by the flags or the cluster.

    Args:
      arguments: the parsed flags of `add_process_flags`.
      workdir: the folder of the run.
    """
    start_processes(
        coordinator=arguments.coordinator,
        num_processes=arguments.num_processes,
        process_id=arguments.process_id,
        asked=arguments.distributed,
        workdir=workdir,
    )
