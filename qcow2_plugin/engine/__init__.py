"""One image: its tables, where guest ranges live, and the data path.

`image` is read top to bottom; `mapping` answers where, `tables` keeps what was read, `codec` decompresses, `chain`
opens an image with everything below it.
"""
