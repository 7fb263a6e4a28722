from hypothesis import given
from hypothesis import strategies as st

from besteffort.router.seats import Seats


@given(data=st.data(), number=st.integers(1, 60), num_models=st.integers(1, 4))
def test_however_much_others_take_each_model_has_seats_of_its_own(
    data: st.DataObject, number: int, num_models: int
) -> None:
    seats, taken = Seats(number, num_models), [0] * num_models
    own = number // (4 * num_models)
    for _ in range(data.draw(st.integers(0, 100))):
        model = data.draw(st.integers(0, num_models - 1))
        full = seats.full(taken, ())
        assert not full or sum(taken) >= seats.scarce_from
        if sum(taken) < number and model not in full:
            taken[model] += 1
        else:
            assert taken[model] >= own
            taken[model] -= bool(taken[model]) and data.draw(st.booleans())


def test_a_model_takes_three_quarters_and_its_own() -> None:
    seats = Seats(24, 3)
    assert seats.full([19, 0, 0], ()) == ()
    assert seats.full([20, 0, 0], ()) == (0,)
    assert seats.full([20, 1, 0], ()) == (0,)
    assert seats.full([20, 2, 0], ()) == (0, 1)
    assert seats.full([20, 2, 1], ()) == (0, 1)
    assert seats.full([18, 2, 2], ()) == ()


def test_no_seats_are_kept_for_models_that_are_down_nor_where_there_is_but_one() -> None:
    assert Seats(24, 3).full([21, 0, 0], ()) == (0,)
    assert Seats(24, 3).full([21, 0, 0], (1,)) == ()
    assert Seats(24, 3).full([22, 0, 0], (1,)) == (0, 1)
    assert Seats(24, 3).full([23, 0, 0], (1, 2)) == ()
    assert Seats(24, 1).full([23], ()) == ()


def test_where_more_is_taken_than_should_be_nobody_is_full() -> None:
    """As after models that were down have come back."""
    assert Seats(24, 3).full([12, 12, 0], ()) == ()
