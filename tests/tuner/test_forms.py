"""Which form a pass takes, by a table."""

from __future__ import annotations

import pytest

from clover_peft.tuner.execution import Form, choose_form


@pytest.mark.parametrize(
    ("has_kept_maps", "is_decoding", "has_dropout", "form"),
    [
        (True, False, False, Form.CACHED),
        (True, True, False, Form.CACHED),
        (True, True, True, Form.CACHED),
        (False, True, False, Form.STAGED),
        (False, True, True, Form.FOLDED),
        (False, False, False, Form.FOLDED),
        (False, False, True, Form.FOLDED),
    ],
)
def test_the_form_of_a_pass(has_kept_maps, is_decoding, has_dropout, form):
    assert choose_form(has_kept_maps=has_kept_maps, is_decoding=is_decoding, has_dropout=has_dropout) is form
