"""What all rooms share: typed errors, named choices, the version, progress bars, output files, devices, ranks.

May import no other room.
"""
