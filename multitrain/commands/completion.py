"""``multitrain completion SHELL``: a script that completes verbs, flags, ``key=value`` options and their values."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Sequence

from pydantic.fields import FieldInfo

from multitrain.config import ConfigError, nearest
from multitrain.config.arguments import Arguments, Parser
from multitrain.config.compose import config_folders
from multitrain.config.schema import fields

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
# multitrain completion bash: eval "$(multitrain completion bash)" in ~/.bashrc
_multitrain_options="{options}"
_multitrain_values="{values}"
declare -gA _multitrain_said
_multitrain_help() {{
    # The words in `PROGRAM VERB --help` that match $1; cached.
    local key="$1 ${{*:2}}"
    [[ -n ${{_multitrain_said[$key]}} ]] ||
        _multitrain_said[$key]=$("${{@:2}}" --help 2>/dev/null | grep -oE -- "$1" | tr -d ' ' | awk '!seen[$0]++' | tr '\\n' ' ')
    words=${{_multitrain_said[$key]}}
}}
_multitrain() {{
    local word=${{COMP_LINE:0:COMP_POINT}} words run at=1
    word=${{word##*[[:space:]]}}
    [[ ${{COMP_WORDS[0]}} == *python* ]] && at=2
    local program=("${{COMP_WORDS[@]:0:at}}")
    COMPREPLY=()
    if [[ ${{program[at-1]}} == *multitrain ]]; then
        if [[ $COMP_CWORD -eq $at ]]; then
            _multitrain_help '^  [a-z]+ ' "${{program[@]}}"
            COMPREPLY=($(compgen -W "$words" -- "$word"))
            return
        fi
        program+=("${{COMP_WORDS[at]}}")
        if [[ ${{COMP_WORDS[at]}} == data ]]; then
            if [[ $COMP_CWORD -eq $((at + 1)) && $word != -* ]]; then
                _multitrain_help '^  [a-z]+ ' "${{program[@]}}"
                COMPREPLY=($(compgen -W "$words" -- "$word"))
            elif [[ ${{COMP_WORDS[at+1]}} == [a-z]* && ${{COMP_WORDS[at+1]}}${{COMP_WORDS[at+2]}} != *=* ]]; then
                program+=("${{COMP_WORDS[at+1]}}")
            fi
        fi
    fi
    if [[ $word == -* ]]; then
        _multitrain_help '--[a-z][a-z-]*' "${{program[@]}}"
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    elif [[ $word == *=* ]]; then
        words=" $_multitrain_values "
        COMPREPLY=($(compgen -W "$words" -- "$word"))
        # `=` ends a word in bash, so that completion replaces only what follows it.
        [[ $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#*=}}")
    else
        words=
        for run in runs/*; do
            [[ ${{run#runs/}} == *[!A-Za-z0-9._+,@-]* ]] || words+=" ${{run#runs/}}"
        done
        COMPREPLY+=($(compgen -W "$_multitrain_options $words" -- "$word") $(compgen -f -- "$word"))
        [[ ${{COMPREPLY[*]}} == *= ]] && compopt -o nospace
    fi
}}
_multitrain_python() {{
    # Complete `python launch/submit.py …`; use the default completion for everything else.
    COMPREPLY=()
    [[ $COMP_CWORD -gt 1 && ${{COMP_WORDS[1]}} == *launch/@(submit|sweep).py ]] && _multitrain
}}
complete -o default -F _multitrain multitrain
complete -o default -F _multitrain launch/submit.py ./launch/submit.py launch/sweep.py ./launch/sweep.py
for _multitrain_word in python python3; do
    complete -p $_multitrain_word >/dev/null 2>&1 || complete -o bashdefault -o default -F _multitrain_python $_multitrain_word
done
"""

_ZSH = """\
# multitrain completion zsh: eval "$(multitrain completion zsh)" in ~/.zshrc
autoload -U +X compinit && compinit -u
autoload -U +X bashcompinit && bashcompinit
"""

_FISH = """\
# multitrain completion fish: multitrain completion fish | source
complete -c multitrain -n "test (count (commandline -opc)) -eq 1" -f -a "(multitrain --help | string match -rg -- '^  ([a-z]+) ')"
complete -c multitrain -n "test (count (commandline -opc)) -eq 2; and test (commandline -opc)[2] = data" -f -a \\
    "(multitrain data --help | string match -rg -- '^  ([a-z]+) ')"
complete -c multitrain -n "test (count (commandline -opc)) -gt 1" -a "{options} {values}"
complete -c multitrain -n "string match -q -- '-*' (commandline -ct)" -a \\
    "(multitrain (string match -v -- '*=*' (commandline -opc)[2..3]) --help | string match -ra -- '--[a-z][a-z-]*')"
complete -c python -n "string match -q -- '*launch/submit.py' (commandline -opc)[2]" -a "{options} {values}"
"""


def script(shell: str, config_dirs: Sequence[str] = ()) -> str:
    """The completion script of a shell; `config_dirs` are folders with the user's config groups.

    Raises:
        ConfigError: the shell is not supported.
    """
    words = {
        "options": " ".join(f"{name}=" for name in options()),
        "values": " ".join(values(config_dirs)),
    }
    if shell == "bash":
        return _BASH.format(**words)
    if shell == "zsh":
        return _ZSH + _BASH.format(**words).partition("\n")[2].replace("declare -gA", "typeset -gA")
    if shell == "fish":
        return _FISH.format(**words)
    raise ConfigError(f"{shell!r}: {nearest(shell, SHELLS)}")


def options() -> list[str]:
    """All options of a run with fixed names (``nodes``, ``cluster.partition``), and the config groups."""
    return sorted({name for name, _ in _groups()} | _leaves().keys())


def _leaves() -> dict[str, FieldInfo]:
    """The options with fixed names, without the groups of options."""
    named = {name: field for name, field in fields().items() if "<" not in name}
    return {name: field for name, field in named.items() if not any(n.startswith(f"{name}.") for n in named)}


def values(config_dirs: Sequence[str] = ()) -> list[str]:
    """All ``key=value`` pairs of options with a fixed set of values."""
    found = [f"{group}={choice}" for group, choice in _groups(config_dirs)]
    for name, field in _leaves().items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        choices = [c for kind in kinds for c in _choices(kind)]
        found += [f"{name}={choice}" for choice in dict.fromkeys(choices)]
    return sorted(found)


def _choices(annotation: object) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    return [str(v) for v in typing.get_args(annotation)] if typing.get_origin(annotation) is typing.Literal else []


def _groups(config_dirs: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Config groups and choices whose names need no quoting in a shell."""
    for folder in config_folders(config_dirs):
        for file in sorted(folder.glob("*/*.yaml")):
            if re.fullmatch(r"[\w.+-]+=[\w.+-]+", f"{file.parent.name}={file.stem}", re.ASCII):
                yield file.parent.name, file.stem


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
    given = parser.parse_args(arguments)
    print(script(given.shell, given.config_dir), end="")
    return 0
