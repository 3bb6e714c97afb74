"""Settings all tests share."""

from hypothesis import settings

# The first example of a property compiles numba code; a deadline would measure that.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
