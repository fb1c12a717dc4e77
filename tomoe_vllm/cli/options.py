"""Options that several commands share, and commands whose options are the fields of a settings model."""

import inspect
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

Out = Annotated[Path, typer.Option(help="Folder to write; must not exist yet.", show_default=False)]
Base = Annotated[Path, typer.Option(help="Folder of the dense model.")]
Model = Annotated[Path, typer.Option(help="Folder of a dense model or a ToMoE checkpoint.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Dtype of the weights; auto: as stored on a GPU, float32 on a CPU."),
]
Backend = Annotated[Literal["hf", "vllm"], typer.Option(help="hf (the reference model) or vllm.")]
BlockSize = Annotated[int, typer.Option(help="Tokens per block.")]
MaxBlocks = Annotated[int | None, typer.Option(help="Blocks to score; 0 scores all.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML or TOML file of settings; flags and --set override it.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Override any setting (VALUE in YAML); may be repeated."),
]


TYPER: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
"""Arguments of every ``Typer``. Help is plain text: boxes cut off long option names on narrow terminals."""


class _Verbatim(TyperCommand):
    """A command that receives its arguments unparsed, in ``context.args``."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, [])
        ctx.args = list(args)
        return rest


def settings_command(
    app: typer.Typer,
    model: str,
    *,
    only: Collection[str] = (),
    argument: str | None = None,
    after_dashes: str | None = None,
) -> Callable[[Callable[..., None]], None]:
    """Register a function as a command with an option for each field of a settings model.

    The function's first parameter receives the settings that were given, by name; its other parameters are
    options of their own. The model is imported, and the options are made, when the command is used.

    Args:
        model: "module:class" of a :class:`tomoe_vllm.settings.Settings`.
        only: Fields that become options; all if empty.
        argument: Field that is a positional argument.
        after_dashes: Field that receives the words after ``--``, which are flags for vLLM.
    """

    def register(function: Callable[..., None]) -> None:
        @app.command(function.__name__, cls=_Verbatim, add_help_option=False, help=function.__doc__)
        def command(context: typer.Context) -> None:
            module, _, name = model.partition(":")
            settings, words = getattr(import_module(module), name), context.args
            more: dict[str, Any] = {}
            if after_dashes and "--" in words:
                at = words.index("--")
                if at + 1 < len(words):  # a bare -- keeps the value of a weaker source
                    more = {after_dashes: words[at + 1 :]}
                words = words[:at]
            parser = typer.Typer(**TYPER)
            parser.command(help=function.__doc__)(_with_options(function, settings, only, argument, after_dashes, more))
            words = repeat_option("--data", words)
            try:
                code = parser(words, prog_name=context.command_path, standalone_mode=False)
            except Exception as error:
                if after_dashes and hasattr(error, "possibilities"):  # only typer's error for an unknown option has it
                    message = getattr(error, "format_message", error.__str__)()
                    raise ValueError(f"{message}; flags for vLLM go after --") from None
                raise
            raise typer.Exit(code or 0)

    return register


def repeat_option(option: str, words: list[str]) -> list[str]:
    """``--data a b`` as ``--data a --data b``: Typer takes one value for each occurrence of an option."""
    repeated: list[str] = []
    takes_words = False
    for word in words:
        if word.startswith("-"):
            takes_words = word.partition("=")[0] == option
        elif takes_words and repeated[-1] != option:
            repeated.append(option)
        repeated.append(word)
    return repeated


def _with_options(
    function: Callable[..., None],
    model: Any,
    only: Collection[str],
    argument: str | None,
    after_dashes: str | None,
    more: dict[str, Any],
) -> Callable[..., None]:
    """``function`` with the signature that Typer reads: a parameter for each setting, instead of the first one."""
    names = [name for name, field in model.model_fields.items() if name in only or (not only and _is_flag(field))]
    names.sort(key=lambda name: name not in model.__annotations__)  # inherited fields last
    parameters = [*inspect.signature(function).parameters.values()][1:]
    parameters += [_parameter(name, model.model_fields[name], name == argument) for name in names]

    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        if after_dashes and given[after_dashes]:  # several words in one value: the model splits them at spaces
            given[after_dashes] = " ".join(given[after_dashes])
        function({name: value for name, value in given.items() if value not in (None, [])} | more, **values)

    signature = inspect.Signature([parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, field: Any, is_argument: bool) -> inspect.Parameter:
    """The parameter of a setting. Its own default is None, which stands for "not given"."""
    has_default = not field.is_required() and field.default not in (None, [], "")
    text = " ".join(field.description.split()) + (f" [default: {field.default}]" if has_default else "")
    info = (typer.Argument if is_argument else typer.Option)(help=text, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[field.annotation | None, info]
    )


def _is_flag(field: Any) -> bool:
    """Whether a flag can hold the field's value: mappings are for files and --set."""
    return all((get_origin(kind) or kind) is not dict for kind in (field.annotation, *get_args(field.annotation)))
