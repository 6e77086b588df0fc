"""The files beside a ``.ckpt`` file that let a run resume with all its state.

States come and go as dictionaries of tensors and plain values; nothing is ever unpickled. Nothing here knows servers,
links or Lightning's loops. ``files`` writes and reads bytes, ``manifest`` says what belongs together, ``saves`` keeps
track of saves, ``writer`` writes in the background, ``places`` knows names, and ``resume`` finds what may be read.
"""
