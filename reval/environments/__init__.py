"""Environments: tasks of several turns, in which the model and a program of yours answer each other.

This package does not import torch, transformers or numpy, because every worker process imports it.
"""

from reval.environments.pool import Conversation, EnvironmentPool
from reval.environments.protocol import Environment, EnvironmentFault, Message, question, resolve

__all__ = ["Conversation", "Environment", "EnvironmentFault", "EnvironmentPool", "Message", "question", "resolve"]
