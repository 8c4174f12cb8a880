"""The lab: the tiny world, how its models are made, and how they are judged.

    python -m tiny show                 a contact sheet of clips and captions, whole and corrupted
    python -m tiny probe --num 200      what of 200 unseen prompts the shipped model gets right
    python -m tiny compare --num 12     an animated picture: unseen scenes as rendered, and as sampled
    python -m tiny score-vae            the VAE against a linear codec
    python -m tiny score-depth          Depth Anything's twin, against the rooms' depth and cameras
    python -m tiny validate             how well each reward term tells good from bad

    python -m tiny captions             tiny/prompts.jsonl
    python -m tiny vae --minutes 100    the twins, in this order: vae; data, dit; depth (needs vae), critic
                                        (needs depth); preference; train-probe; each resumes where it stopped
    python -m tiny export               what RUN has trained, as it is shipped -> tiny/, over what is there
    python -m tiny web --minutes 13     the base of training, an adapter of the exported tiny/wan; then export

RUN is the folder of --run, runs/tiny by default. python -m tiny COMMAND --help lists a command's options.
"""

import argparse
import json
import sys
from pathlib import Path

from depth_anything import load_depth_anything
from rewards import add_reward_options, rewards_of
from sample import LIMITS, check_limits, check_writable, contact_sheet
from tiny import judges, probe, train, validity, world
from weights import TINY, as_command, command_line, write_text

# ----------------------------------------------------------------------------------------------- the commands

# A command's function takes the options of its parser by their names.

def show(run, seed):
    """Six clips of each split, then four of them corrupted."""
    scenes = world.random_scenes(seed, "static", 6) + world.random_scenes(seed, "dynamic", 6)
    corrupted = [world.corrupt(scene, kind) for scene, kind in zip(scenes, world.CORRUPTIONS)]
    contact_sheet(run / "show.png", [*world.render_all(scenes), *corrupted])
    print(*[scene.caption for scene in scenes], *world.CORRUPTIONS, run / "show.png", sep="\n")


def captions(out):
    lines = [json.dumps(row) + "\n" for row in world.prompt_rows()]
    write_text(out, "".join(lines))
    print(out)


def score_depth(run, model, num):
    figures = judges.depth_metrics(load_depth_anything(model), num, run / "score-depth.png")
    for name, value in figures.items():
        print(f"{name:14} {value:.3f}")


def validate(num, seed, **options):
    validity.validate(rewards_of(argparse.Namespace(**options)).load(), num, seed)


def export(run, out):
    """Whatever RUN has trained, in bfloat16."""
    if not any(run.glob("*/state.pt")):
        raise ValueError(f"{run} holds nothing that is trained; give the --run of a training")
    for name, write, folder in (("dit", train.export_wan, "wan"),
                                ("web", train.export_web, "web"),
                                ("depth", judges.export_depth, "depth_anything"),
                                ("critic", judges.export_critic, "qwen3_vl"),
                                ("preference", judges.export_preference, "hpsv3"),
                                ("probe", probe.export_probe, "probe")):
        if (run / name / "state.pt").exists():
            write(run, out / folder)
            print(out / folder)


# ------------------------------------------------------------------------------------------- the command line

def parse_arguments(argv=None):
    parser = command_line(__doc__, prog="tiny")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, text, run=True, seed=True, num=None):
        """A command's parser with the options that most have."""
        new = commands.add_parser(name, help=text, description=text)
        new.set_defaults(function=function)
        if run:
            new.add_argument("--run", type=Path, default=Path("runs/tiny"),
                             help="folder of states and pictures")
        if seed:
            new.add_argument("--seed", type=int, default=0)
        if num:
            new.add_argument("--num", type=int, default=num, help=f"clips (default {num})")
        return new

    command("show", show, "a contact sheet of clips and captions, whole and corrupted")
    new = command("captions", captions, "the tiny world's prompts, for training", run=False, seed=False)
    new.add_argument("--out", type=Path, default=TINY / "prompts.jsonl")

    # What samples a model.
    new = command("probe", probe.examine, "what of unseen prompts a model gets right", num=200)
    add_model_options(new)
    new.add_argument("--probe", type=Path, default=TINY / "probe", help="its folder")
    new.add_argument("--prompts", help="file of prompts, its test split (default: captions of unseen scenes)")
    new.add_argument("--rendered", action="store_true", help="score the renderer's own clips instead")
    new.add_argument("--no-transport", dest="transport", action="store_false", help="plain noise")
    # With several values of these there is a row for every combination; by default they are the model's.
    for name, kind, text in (("steps", int, "sampling steps"),
                             ("guidance", float, "classifier-free guidance"),
                             ("shift", float, "of the noise schedule"),
                             ("strength", float, "of the noise's camera path (default 1)"),
                             ("degradation", float, "fresh noise mixed in")):
        new.add_argument(f"--{name}", type=kind, nargs="+", help=text)
    new.add_argument("--noise-path", nargs="+", choices=probe.NOISE_PATHS,
                     help="the camera path that moves the noise (default: the prompt's own)")
    new = command("compare", probe.compare, "an animated picture of scenes, rendered and sampled", num=12)
    add_model_options(new)

    # Figures of the twins.
    new = command("score-vae", probe.score_vae, "the VAE against a linear codec", run=False, seed=False,
                  num=64)
    new.add_argument("--model", type=Path, default=TINY / "wan", help="a Wan folder")
    new = command("score-depth", score_depth, "Depth Anything on held-out clips", seed=False, num=64)
    new.add_argument("--model", default=TINY / "depth_anything", help="folder or hub id")
    new = command("validate", validate, "how well each reward term tells good from bad", run=False, num=200)
    add_reward_options(new)

    # How they are made.
    def training(name, function, text):
        new = command(name, function, text)
        new.add_argument("--minutes", type=float, default=60,
                         help="of training without its reports, over all resumes")
        return new

    training("vae", train.train_vae, "trains the causal 3D VAE")
    new = command("data", train.make_data, "renders clips and encodes them", seed=False)
    new.add_argument("--clips", type=int, default=8192,
                     help="in all, in shards of 512 (default 8192); those that are there are kept")
    training("dit", train.train_dit, "trains the DiT and its text encoder")
    new = training("web", train.train_web, "gives tiny/wan the faults of a model of web videos")
    new.add_argument("--moved-noise", action="store_true", help="train with noise that moves with the camera")
    training("depth", judges.train_depth, "trains Depth Anything's twin")
    new = training("critic", judges.train_critic, "trains Qwen3-VL's twin")
    new.add_argument("--clips", type=int, default=400, help="that it sees reconstructions of (default 400)")
    training("preference", judges.train_preference, "trains HPSv3's twin")
    training("train-probe", probe.train_probe, "trains the classifier of `probe`")
    new = command("export", export, "writes what RUN has trained as it is shipped", seed=False)
    new.add_argument("--out", type=Path, default=TINY,
                     help="the folder written (default: tiny/, whose shipped models are replaced)")
    return parser.parse_args(argv)


def add_model_options(parser):
    parser.add_argument("--model", default=TINY / "wan", help="folder or hub id (default: the shipped one)")
    parser.add_argument("--lora", nargs="+", default=[],
                        help="adapters' files or run folders: a row or column each")
    parser.add_argument("--frames", type=int, help="of a video, 4k+1 (default: the model's)")


def check(options):
    """ValueError for the first number that cannot work."""
    for name in ("num", "clips", "minutes"):
        value = options.get(name)
        if value is not None and not 0 < value <= 10 ** 6:
            raise ValueError(f"--{name} must be above 0 and at most a million, got {value}")
    # Of probe, some take several values.
    for name in [name for name in LIMITS if name in options and name != "num"]:  # num: see above
        values = options[name]
        for value in values if isinstance(values, list) else [values]:
            check_limits({name: value})
    if options.get("run"):
        check_writable(options["run"] / "state.pt", "--run")


@as_command("tiny")
def main(argv=None):
    options = vars(parse_arguments(argv))
    function = options.pop("function")
    check(options)
    function(**options)


if __name__ == "__main__":
    sys.exit(main())
