"""What a GPU has to show, in one command: are the kernels right, and how fast are whole models with them?

    python -m benchmarks.gpu --quick        # right or not, and the one comparison that matters: at most ten minutes
    python -m benchmarks.gpu --full         # more bits, models, sizes and batches, ten minutes at a time
    python -m benchmarks.gpu.page           # the tables and charts of what is measured

Reading order: ``plan`` (what is to be done, in steps), ``processes`` (each step in a process of its own), ``work``
(what a step does), ``problems`` (kernels), ``models`` and ``contenders`` (whole models), ``results`` (a line for each
step), ``stand_in`` (all of it without a GPU).
"""
