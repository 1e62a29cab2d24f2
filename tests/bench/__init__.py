"""Side-by-side measurements: this project next to the tools that a user would pick instead.

`bash tests/bench/run.sh` makes its own images in memory, runs every contender in turn, round after round, and prints
tables of figures and ratios. It judges nothing: no figure makes it fail, and pytest does not collect it.

    __main__            options, order of the sections, cleaning up
    images              the disks and images that are measured
    servers             NBD servers, started and ended
    nbd, writes, tools, care, memory
                        one family of measurements each
    fio                 the client that reads and writes
    in_process          the part that runs inside a fresh Python with the package imported
    passthrough_plugin  the floor: the least that an nbdkit plugin in Python can do
    report              rounds, medians, ratios, markdown and JSON
    processes           running programs, timing them, their peak memory
"""
