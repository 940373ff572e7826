"""No test of this room is timed: machines that run tests are busy ones."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
