"""The limits of format major 1, each with its reason and its worst case. A reader allocates nothing before them.

They are the reader's own: nothing in a file can raise one. formats/SPEC.md lists the same numbers.
"""

from __future__ import annotations

MAX_VCPUS = 4096
"""KVM_CAP_MAX_VCPU_ID of x86 is 4096 on the kernels measured; arm64 allows 512."""

MAX_RAW = 16 << 20
"""Bytes of one section after its codec. A decoder holds at most this, its filtered copy and the matrix: 48 MiB."""

MAX_STORED = MAX_RAW + (MAX_RAW >> 7) + 4096
"""Bytes of one section as stored: raw plus what zstd may add to data that doesn't shrink."""

MAX_MATRIX = MAX_RAW
"""Bytes of a decoded bank: vCPUs x row. A writer splits the vCPU range to stay below."""

MAX_ROW = 64 << 10
"""Bytes of one bank row. Full x86 state with AMX is below 24 KiB, arm64 with SVE below 20 KiB."""

MAX_SLOTS = 8192
"""Columns of a layout, 20 times the longest register list seen."""

MAX_LAYOUTS = 64
"""Layouts of a stream: two scopes x six phases, and room."""

MAX_STATE = 128 << 10
"""Bytes of all rows of one vCPU, and of the VM: a whole stream decodes to at most 4096 x this, 512 MiB."""

MAX_REGIONS = 512
"""RAM regions: KVM's common limit of user memory slots before 5.x."""

MAX_RUNS = 65536
"""Runs in one RAM section."""

MAX_TEXT = 1 << 20
"""Bytes of a msgpack payload other than opaque state."""

MAX_MSGPACK_DEPTH = 8
"""Nesting of a msgpack payload; the outermost value is at depth 1."""

MAX_ITEMS = 65536
"""Values in a msgpack payload, counted before one is made: 16 MiB of empty arrays would be 1.3 GiB of objects."""

MAX_OPAQUE = 64 << 20
"""Bytes of all opaque sections before the codec; a restorer holds them to the end."""

MAX_SKIPPED = 1024
"""Unknown ancillary sections of a stream; each is kept to be reported."""

MAX_ADDRESS = 1 << 52
"""Guest-physical addresses: the most that x86-64 and arm64 (LPA) define."""

RAM_CHUNK = 4 << 20
"""Bytes of page data that a writer puts into one RAM section."""

MAX_PROFILE = 4 << 20
"""Bytes of a host profile's JSON, 20 times the largest recorded one; read whole before it is looked at."""

MAX_CONTRACT = 1 << 20
"""Bytes of a contract file, 50 times one of arm64 with all features; read whole before it is looked at."""

MAX_POLICY = 1 << 20
"""Bytes of a policy file, likewise."""

MAX_POLICY_NAMES = 1024
"""Names and globs of a policy, all rows together: each glob is held against every register of the catalogue."""

MAX_PROFILE_ROWS = 8192
"""Entries of one table or list of a host profile: as many as columns of a layout. Two such profiles are compared in
seconds."""

MAX_PROFILE_TEXT = 4096
"""Characters of one text in a host profile."""
