"""What the reward function reads of a response."""

from reval.data import Problem
from reval.rewards import RewardPool
from reval.rollout import Response
from reval.scoring import score


def test_the_reward_sees_special_tokens_but_not_the_one_that_ends_the_response(tiny):
    """`<|user|>7<|assistant|>` is not 7. A response that the length limit cut off may end with any token."""
    _, tokenizer = tiny
    tokens = ["7", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    seven, end, pad, user, assistant = tokenizer.convert_tokens_to_ids(tokens)
    responses = [
        Response([seven, end], finished=True),
        Response([user, seven, assistant, end], finished=True),
        Response([pad, seven, end], finished=True),
        Response([seven, user], finished=False),
        Response([end], finished=True),
    ]
    problem = Problem([{"role": "user", "content": "3 + 4 ="}], [1], {"answer": "7"})
    with RewardPool("number", workers=1, timeout=5.0) as pool:
        texts, scores = score([problem] * 5, responses, pool, tokenizer)
    assert texts == ["7", "<|user|>7<|assistant|>", "<|pad|>7", "7<|user|>", ""]
    assert scores.rewards == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_process_without_a_share_decodes_and_scores_nothing(tiny):
    """This is the second of two processes with rollout.prompts=1. From an empty list of responses, the tokenizer would
    make one empty text."""
    with RewardPool("number", workers=1, timeout=5.0) as pool:
        texts, scores = score([], [], pool, tiny[1])
    assert texts == scores.rewards == []
