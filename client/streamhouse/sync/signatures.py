"""Shows options of the asynchronous classes in `help` and in editors for the classes of plain code."""

import inspect


def show_options(plain: type, wrapped: type) -> None:
    """Replaces `**options` in the constructor signature of `plain` by the options of `wrapped`, and adds their
    documentation."""
    own = inspect.signature(plain.__init__)  # type: ignore[misc]
    named = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    names = {item.name for item in named}
    handed_on = [
        item
        for item in inspect.signature(wrapped.__init__).parameters.values()  # type: ignore[misc]
        if item.kind is inspect.Parameter.KEYWORD_ONLY and item.name not in names
    ]
    plain.__init__.__signature__ = own.replace(parameters=[*named, *handed_on])  # type: ignore[misc]
    options = (wrapped.__doc__ or "").partition("\n\n")[2]  # the first paragraph is about `await`
    plain.__doc__ = f"{plain.__doc__ or ''}\n\n{options}"
