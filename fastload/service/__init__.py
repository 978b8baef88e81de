"""The node's cache service: the one owner of what is in RAM and on disk, for all processes of a node.

One thread, the loop's, changes all records; threads beside it do what blocks. Trainers reach it through `client`.
"""
