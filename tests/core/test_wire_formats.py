"""Which format a link has, what a wrong order says, and which messages are rounded."""

from __future__ import annotations

import pytest

from lightning_halos.core.messages import GlobalModel, InitialModel, Pull, Push, RegionUpdate
from lightning_halos.core.wire_formats import WireFormats, is_rounded


def test_one_name_is_for_all_links() -> None:
    formats = WireFormats.of("int8")
    assert (formats.on(1, 1), formats.on(0, 1)) == ("int8", "int8")
    assert not formats.is_plain


def test_links_inside_and_between_regions_may_differ() -> None:
    formats = WireFormats.of({"between": "int4"})
    assert (formats.on(1, 1), formats.on(0, 1)) == ("float32", "int4")
    assert WireFormats.of(formats) is formats
    assert WireFormats.of("float32").is_plain


@pytest.mark.parametrize(
    ("wire", "error", "message"),
    [
        ("int3", ValueError, r"wire='int3' must be one of 'float32', 'bfloat16', 'int8', 'int4'\."),
        (4, TypeError, r"wire=4 must be one of .* or a dict with formats for the links 'within' and 'between'"),
        ({"inside": "int8"}, ValueError, r"wire=\{'inside': 'int8'\} must be one of"),
        ({"within": "int3"}, ValueError, r"wire\['within'\]='int3' must be one of"),
    ],
)
def test_a_wrong_order_is_refused(wire: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WireFormats.of(wire)


def test_complete_models_and_last_updates_are_not_rounded() -> None:
    assert is_rounded(Push(0, 0, 1, 1, 1.0))
    assert not is_rounded(Push(0, 0, 1, 1, 1.0, final=True))
    assert is_rounded(RegionUpdate(0, 0, 1))
    assert not is_rounded(RegionUpdate(0, 0, 1, final=True))
    assert is_rounded(Pull(0, 1, 1, False, is_difference=True))
    assert not is_rounded(Pull(0, 1, 1, False))
    assert is_rounded(GlobalModel(0, is_difference=True))
    assert not is_rounded(GlobalModel(0, final=True))
    assert not is_rounded(InitialModel())
