"""The files next to a ``.ckpt`` file that let a run resume with all its state.

States are dictionaries of tensors and plain values; nothing is unpickled. This package is independent of servers, links
and Lightning's loops. ``files`` writes and reads files, ``manifest`` lists the shards of a checkpoint, ``saves`` tracks
saves, ``writer`` writes in the background, ``places`` finds files by name, and ``resume`` finds and reads shards.
"""
