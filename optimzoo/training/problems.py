"""Pydantic's findings as sentences that name the key and its nearest known neighbour."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from optimzoo.core.hyper import nearest, shown


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Every finding of `error` in one line."""
    return "; ".join(dict.fromkeys(_sentence(finding, root) for finding in error.errors()))


def _sentence(finding: Any, root: type[BaseModel]) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    key, section = _resolve(finding["loc"], root)
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key.rsplit('.', 1)[-1], section.model_fields)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "union_tag_not_found":
        return f"{key} must say its name"
    if kind == "union_tag_invalid":
        known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        return f"{key}.name={context['tag']!r} is not known{nearest(context['tag'], known)}"
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    message = finding["msg"].replace("Input should be", "must be")
    value = finding["input"]
    said = f"={shown(value)}" if not isinstance(value, dict) else ""
    return f"{key}{said} {message[0].lower()}{message[1:]}"


def _resolve(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """The dotted key without the tags that pydantic adds for unions, and the model that holds the key."""
    keys: list[str] = []
    section, choices = root, dict[Any, type[BaseModel]]()
    for part in location:
        if part in choices:
            section, choices = choices[part], {}
            continue
        keys.append(str(part))
        field = section.model_fields.get(str(part))
        if field is None:
            continue
        models = [m for m in (field.annotation, *get_args(field.annotation)) if _is_model(m)]
        choices = {get_args(m.model_fields["name"].annotation)[0]: m for m in models} if field.discriminator else {}
        if len(models) == 1:
            section = models[0]
    return ".".join(keys), section


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
