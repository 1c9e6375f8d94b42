"""The two ways in which the lab itself can fail, each with the exit status that the command line gives it."""

from __future__ import annotations


class LabError(Exception):
    """The lab could not do its work: nothing fetched, no emulator, a kernel that does not boot.

    The first line of the message says what to do next; the console's last lines may follow it.
    """

    status = 125


class TimeLimitError(LabError):
    """The guest was still running when its time was over."""

    status = 124
