"""What is wrong with an environment, in one line for the user who can mend it."""

import contextlib
import difflib
import os
import sys
import traceback

import gymnasium as gym

RESULTS = ("reset must return (observation, info), step (observation, reward, terminated, "
           "truncated, info)")


class EnvError(Exception):
    """The environment cannot be used. The message is one line, fit to be shown to the user."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # the text of a space may have several


def explain(error: BaseException) -> str:
    """`Type: text (file, line 3)`: the innermost line of the user's own code, if there is one."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300] + _where(error)
    return f"{text}; {RESULTS}" if "values to unpack (expected" in text else text


def rendering() -> str:
    """What to do where rendering fails."""
    return ("to render MuJoCo without a display, set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
            if "mujoco" in sys.modules else
            "to be rendered, it must accept render_mode='rgb_array' and render() give a picture")


def _where(error: BaseException) -> str:
    folders = [os.path.join(os.path.dirname(p), "") for p in (__file__, gym.__file__, os.__file__)]
    lines = [f" ({frame.filename}, line {frame.lineno})"
             for frame in traceback.extract_tb(error.__traceback__)
             if not frame.filename.startswith(("<", *folders))]
    return ([line for line in lines if "site-packages" not in line] or lines or [""])[-1]


def reason(config, error: BaseException, is_atari: bool) -> str:
    """Why Gymnasium could not make the environment of an `EnvConfig`."""
    module, _, name = config.env_id.rpartition(":")
    entry = entry_point(config.env_id)  # gymnasium.envs.box2d.car_racing:CarRacing: box2d
    extra = "atari" if is_atari else entry.partition("gymnasium.envs.")[2]
    if isinstance(error, gym.error.DependencyNotInstalled) and extra:
        package = f"gymnasium[{extra.partition('.')[0]}]=={gym.__version__}"
        return f'{config.env_id} needs a package: pip install "{package}"'
    is_unknown = isinstance(error, gym.error.Error) and not entry and not _where(error)
    if is_unknown or ":" in module:
        similar = [f"{module}{':' * bool(module)}{known}"
                   for known in difflib.get_close_matches(name, gym.registry, cutoff=0.7)]
        return (f"unknown environment id {config.env_id!r}"
                + f"; {module} was imported and registers no {name!r}" * bool(module)
                + f"; did you mean {' or '.join(similar)}?" * bool(similar)
                + f"; one of your own is your_module:{name}" * (not module))
    if isinstance(error, ImportError | TypeError) and type(error.__cause__) is type(error):
        error = error.__cause__  # Gymnasium has raised it again, with more words
    if isinstance(error, ImportError) and f"{module}.".startswith(f"{error.name}."):
        where = "run from its folder?" if module[:7] != "common." else "give yours another name"
        return f"cannot import the module of {config.env_id!r} ({where}): {error}"
    hint = f" ({rendering()})" if config.render or config.pixels else ""
    return f"cannot build {config.env_id!r}: {explain(error)}{hint}"


def entry_point(env_id: str) -> str:
    """`module:class` of a registered environment, or nothing."""
    name = env_id.rpartition(":")[2]
    with contextlib.suppress(gym.error.Error):
        space, name, version = gym.envs.registration.parse_env_id(name)
        if version is None:  # Gymnasium takes the latest one
            version = gym.envs.registration.find_highest_version(space, name)
        name = gym.envs.registration.get_env_id(space, name, version)
    spec = gym.registry.get(name)
    return str(spec.entry_point) if spec else ""
