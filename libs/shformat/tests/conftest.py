"""Hypothesis without a deadline: time per example says nothing on a machine that others share."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
