"""``multitrain completion SHELL``: a script that completes verbs, flags, ``key=value`` options and their known values."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from multitrain.config import ConfigError, RunConfig, config_folder, nearest
from multitrain.config.arguments import Arguments, Parser

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# multitrain completion bash: eval "$(multitrain completion bash)" in ~/.bashrc
_multitrain_verbs=
_multitrain_options="{options}"
_multitrain_values="{values}"
declare -gA _multitrain_flags
_multitrain() {{
    local word=${{COMP_LINE:0:COMP_POINT}} words verb
    word=${{word##*[[:space:]]}}
    verb=${{COMP_WORDS[1]}}
    COMPREPLY=()
    if [[ ${{COMP_WORDS[0]}} == *multitrain && $COMP_CWORD -eq 1 ]]; then
        [[ -n $_multitrain_verbs ]] ||
            _multitrain_verbs=$("${{COMP_WORDS[0]}}" --help 2>/dev/null | sed -n 's/^  \\([a-z][a-z]*\\)  *.*/\\1/p' | tr '\\n' ' ')
        COMPREPLY=($(compgen -W "$_multitrain_verbs" -- "$word"))
        return
    fi
    if [[ $word == *=* ]]; then
        words=" $_multitrain_values "
        COMPREPLY=($(compgen -W "$words" -- "$word"))
        # `=` ends a word for bash, so that only what follows it is replaced.
        [[ $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#*=}}")
    elif [[ $word == -* && ${{COMP_WORDS[0]}} == *multitrain ]]; then
        [[ -n ${{_multitrain_flags[$verb]}} ]] ||
            _multitrain_flags[$verb]=$("${{COMP_WORDS[0]}}" "$verb" --help 2>/dev/null |
                grep -oE -- '--[a-z][a-z-]*' | sort -u | tr '\\n' ' ')
        COMPREPLY=($(compgen -W "${{_multitrain_flags[$verb]}}" -- "$word"))
    else
        COMPREPLY=($(compgen -W "$_multitrain_options" -- "$word") $(compgen -f -- "$word"))
        [[ ${{COMPREPLY[*]}} == *= ]] && compopt -o nospace
    fi
}}
complete -o default -F _multitrain multitrain
complete -o default -F _multitrain launch/submit.py ./launch/submit.py
"""

_ZSH = """\
# multitrain completion zsh: eval "$(multitrain completion zsh)" in ~/.zshrc
autoload -U +X compinit && compinit -u
autoload -U +X bashcompinit && bashcompinit
"""

_FISH = """\
# multitrain completion fish: multitrain completion fish | source
complete -c multitrain -n "test (count (commandline -opc)) -eq 1" -f -a "(multitrain --help | string match -rg -- '^  ([a-z]+) ')"
complete -c multitrain -n "test (count (commandline -opc)) -gt 1" -a "{options} {values}"
complete -c multitrain -n "string match -q -- '-*' (commandline -ct)" -a \\
    "(multitrain (commandline -opc)[2] --help | string match -ra -- '--[a-z][a-z-]*')"
"""


def script(shell: str) -> str:
    """The script of a shell.

    Raises:
        ConfigError: no such shell.
    """
    words = {
        "options": " ".join(f"{name}=" for name in options()),
        "values": " ".join(values()),
    }
    if shell == "bash":
        return _BASH.format(**words)
    if shell == "zsh":
        return _ZSH + _BASH.format(**words).partition("\n")[2].replace("declare -gA", "typeset -gA")
    if shell == "fish":
        return _FISH.format(**words)
    raise ConfigError(f"{shell!r}: {nearest(shell, SHELLS)}")


def options() -> list[str]:
    """Every option of a run without its own part of the name: ``nodes``, ``cluster.partition``, and the config groups."""
    from multitrain.config.compose import _fields

    fields = [name for name in _fields(RunConfig) if "<" not in name]
    groups = {name for name, _ in _groups()}
    inner = {name.rpartition(".")[0] for name in fields}
    return sorted(groups | {name for name in fields if name not in inner})


def values() -> list[str]:
    """``key=value`` for the options that take one of a few values."""
    found = [f"{group}={choice}" for group, choice in _groups()]
    for name, annotation in _annotated():
        choices = [c for part in (annotation, *typing.get_args(annotation)) for c in _choices(part)]
        found += [f"{name}={choice}" for choice in dict.fromkeys(choices)]
    return sorted(found)


def _choices(annotation: object) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    return [str(v) for v in typing.get_args(annotation)] if typing.get_origin(annotation) is typing.Literal else []


def _groups() -> Iterator[tuple[str, str]]:
    for file in sorted(config_folder().glob("*/*.yaml")):
        yield file.parent.name, file.stem


def _annotated() -> Iterator[tuple[str, object]]:
    from multitrain.config.base import Settings

    def walk(model: type[Settings], prefix: str) -> Iterator[tuple[str, object]]:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                yield from walk(field.annotation, f"{prefix}{name}.")
            else:
                yield prefix + name, field.annotation

    return walk(RunConfig, "")


def main(arguments: Arguments) -> int:
    """``multitrain completion SHELL``; returns the exit status."""
    parser = Parser(
        "completion",
        "Print a script that completes commands, flags, options and their values.",
        'eval "$(multitrain completion bash)"       in ~/.bashrc',
        'eval "$(multitrain completion zsh)"        in ~/.zshrc',
        "multitrain completion fish | source        in ~/.config/fish/config.fish",
    )
    parser.add_argument("shell", metavar="SHELL", help=", ".join(SHELLS))
    print(script(parser.parse_args(arguments).shell), end="")
    return 0
