"""The qcow2 format as values: bytes in, value or one error out, and back.

Pure: no files, clocks, locks or logging here, and nothing is allocated because of a count in a file before the count
was held against its limit. Source of the facts: QEMU's docs/interop/qcow2.rst and docs/interop/bitmaps.rst.
"""
