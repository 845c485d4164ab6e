"""Shows in `help` and in editors what the classes for plain code hand on to those they wrap."""

import inspect


def show_options(plain: type, wrapped: type) -> None:
    """Gives the constructor of `plain` the options of `wrapped` for its `**options`, and their documentation."""
    own = inspect.signature(plain.__init__)  # type: ignore[misc]
    named = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {item.name for item in named}
    handed_on = [
        item
        for item in inspect.signature(wrapped.__init__).parameters.values()  # type: ignore[misc]
        if item.kind is inspect.Parameter.KEYWORD_ONLY and item.name not in names
    ]
    plain.__init__.__signature__ = own.replace(parameters=[*named, *handed_on])  # type: ignore[misc]
    options = (wrapped.__doc__ or "").partition("\n\n")[2]  # its first line is about a class that is used with `await`
    plain.__doc__ = f"{plain.__doc__ or ''}\n\n{options}"
