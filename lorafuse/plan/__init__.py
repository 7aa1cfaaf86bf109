"""Problem → Plan: which backend and kernel run a call, and why. Standard library only; usable on any machine."""

from lorafuse.plan.problem import Problem
from lorafuse.plan.select import Plan, select

__all__ = ["Plan", "Problem", "select"]
