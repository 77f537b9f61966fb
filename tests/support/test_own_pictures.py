"""The shipped model learns a new kind of thing and a new question from a folder of pictures."""

from own_pictures import prove


def test_a_new_kind_and_a_new_task_are_learnt(tmp_path):
    """In fewer steps than the tool takes: enough to name the star, and to look to the left."""
    found = prove(tmp_path, steps=60, tested=30)
    before, after = found["shipped, %"], found["trained, %"]
    assert max(before.values()) <= 10, "it can't do this yet"
    assert after["star named"] >= 80 and after["left"] >= 45, after
