"""save() and restore(): the only loops that read, write and call a backend.

The sequence of a save: prologue (machine, layouts, what can't change once the VM has run) while the guest runs; pause;
registers; RAM; banks; end. Of a restore: prologue, plan, refuse here with nothing made; VM, vCPUs, prologue registers;
then RAM and the rest as the bytes arrive, the clock last.
"""

from migstream.transport.converter import convert, plan_conversion
from migstream.transport.pinned import apply_contract, check_host
from migstream.transport.restorer import Restorer, restore
from migstream.transport.saver import Prologue, capture, capture_prologue, save
from migstream.transport.streams import Sink, Source, open_output, open_source, read_chunks, read_items, verify

__all__ = ["Prologue", "Restorer", "Sink", "Source", "apply_contract", "capture",
           "capture_prologue", "check_host", "convert", "open_output", "open_source", "plan_conversion",
           "read_chunks", "read_items", "restore", "save", "verify"]
