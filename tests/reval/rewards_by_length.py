"""A reward that tells a random model's responses apart."""


def score(prompts, completions, completion_ids, **columns):
    return [len(c) / 10 for c in completions]
