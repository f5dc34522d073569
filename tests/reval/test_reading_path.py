"""The code path from a prompt to its weight update stays short: a bounded number of files and public functions."""

from tools.reading_path import reading_path


def test_the_path_from_prompt_to_weight_update_is_short():
    found = reading_path()
    assert len(found.files) <= 22, found.files
    assert len(found.public) <= 45, found.public
    names = [name for _, name in found.public]
    assert names[:2] == ["train", "Generation.next"] and "Learner.update" in names, "the whole way was recorded"
    assert "linear_reval_loss" in names
