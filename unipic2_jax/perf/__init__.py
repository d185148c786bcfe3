"""What a run costs: timed, compiled for machines that are not there, and counted; it imports configs, training, shapes and what
is below them.
"""
