"""What is written beside a ``.ckpt`` file, so that a run goes on with all its state.

Rules of this package: ``files`` knows bytes and folders, ``manifest`` what belongs together, ``saves`` what is under
way and ``resume`` what may be read. None of it knows servers, links or Lightning's loops: states come and go as
dictionaries of tensors and plain values. Nothing is ever unpickled.
"""
