"""The lab: the tiny world, how its models are made, and how they are judged.

    python -m tiny show                          a contact sheet of clips and captions, whole and corrupted
    python -m tiny probe --num 200               what of 200 unseen prompts the shipped model gets right
    python -m tiny compare --num 12              an animated picture: unseen scenes as rendered, and as sampled
    python -m tiny score-vae                     the VAE against a linear codec
    python -m tiny score-depth                   Depth Anything's twin, against the rooms' depth and cameras
    python -m tiny validate                      how well each reward term tells good from bad

    python -m tiny captions                      tiny/prompts.jsonl
    python -m tiny vae --minutes 100             the twins, in this order: vae, data, dit; depth, critic; preference;
                                                 train-probe; each resumes where it was stopped
    python -m tiny export                        what RUN has trained, as it is shipped -> tiny/
    python -m tiny web --minutes 13              the base of training, an adapter of the exported tiny/wan; then export

python -m tiny COMMAND --help lists a command's options.
"""

import argparse
import json
import sys
from pathlib import Path

from depth_anything import load_depth_anything
from lora import lora_file
from rewards import add_reward_options, rewards_of
from sample import check_size, contact_sheet
from tiny import judges, probe, train, validity, world
from weights import TINY, write_text

# ----------------------------------------------------------------------------------------------- the commands

def show(arguments):
    """Six clips of each split, then four of them corrupted."""
    scenes = []
    for split in ("static", "dynamic"):
        scenes += [world.random_scene(arguments.seed, split, i) for i in range(6)]
    videos = [world.render(scene)["video"] for scene in scenes]
    videos += [world.corrupt(scene, kind) for scene, kind in zip(scenes, world.CORRUPTIONS)]
    file = arguments.run / "show.png"
    contact_sheet(file, videos)
    print(*[scene.caption for scene in scenes], *world.CORRUPTIONS, file, sep="\n")


def captions(arguments):
    lines = [json.dumps(row) + "\n" for row in world.prompt_rows()]
    write_text(arguments.out, "".join(lines))
    print(arguments.out)


def examine(arguments):
    check(arguments)
    names = ("lora", "steps", "guidance", "shift", "strength", "degradation")  # the order of a row's name
    settings = {name: getattr(arguments, name) for name in names}
    probe.examine(arguments.run, arguments.model, arguments.probe, settings, arguments.prompts, arguments.num,
                  arguments.seed, arguments.frames, arguments.rendered, arguments.transport)


def compare(arguments):
    check(arguments)
    probe.compare(arguments.run, arguments.model, arguments.lora, arguments.num, arguments.seed,
                  arguments.frames)


def check(arguments):
    """ValueError for what would fail late: a wrong length, a file that is not there."""
    check_size(arguments.frames, None, None)
    for file in arguments.lora:
        lora_file(file)


def score_vae(arguments):
    probe.score_vae(arguments.model, arguments.num)


def score_depth(arguments):
    da3 = load_depth_anything(arguments.model)
    figures = judges.depth_metrics(da3, arguments.num, arguments.run / "score-depth.png")
    for name, value in figures.items():
        print(f"{name:14} {value:.3f}")


def validate(arguments):
    validity.validate(rewards_of(arguments).load(), arguments.num, arguments.seed)


def make_data(arguments):
    train.make_data(arguments.run, arguments.clips)


def export(arguments):
    """Whatever RUN has trained, in bfloat16."""
    def ship(name, write, folder):
        if (arguments.run / name / "state.pt").exists():
            write(arguments.run, arguments.out / folder)
            print(arguments.out / folder)

    ship("dit", train.export_wan, "wan")
    ship("web", train.export_web, "web")
    ship("depth", judges.export_depth, "depth_anything")
    ship("critic", judges.export_critic, "qwen3_vl")
    ship("preference", judges.export_preference, "hpsv3")
    ship("probe", probe.export_probe, "probe")


# ------------------------------------------------------------------------------------------- the command line

def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(prog="tiny", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, text, run=True, seed=True, num=None):
        """A command's parser with the options that most have."""
        new = commands.add_parser(name, help=text, description=text)
        new.set_defaults(function=function)
        if run:
            new.add_argument("--run", type=Path, default=Path("runs/tiny"), help="folder of states and pictures")
        if seed:
            new.add_argument("--seed", type=int, default=0)
        if num:
            new.add_argument("--num", type=int, default=num, help=f"clips (default {num})")
        return new

    command("show", show, "a contact sheet of clips and captions, whole and corrupted")
    new = command("captions", captions, "the tiny world's prompts, for training", run=False, seed=False)
    new.add_argument("--out", type=Path, default=TINY / "prompts.jsonl")

    # What samples a model.
    new = command("probe", examine, "what of unseen prompts a model gets right", num=200)
    add_model_options(new)
    new.add_argument("--probe", type=Path, default=TINY / "probe", help="its folder")
    new.add_argument("--prompts", help="file of prompts, its test split (default: captions of unseen scenes)")
    new.add_argument("--rendered", action="store_true", help="score the renderer's own clips instead")
    new.add_argument("--no-transport", dest="transport", action="store_false", help="plain noise")
    # With several values of these there is a row for every combination; by default they are the model's.
    new.add_argument("--steps", type=int, nargs="+", help="sampling steps")
    new.add_argument("--guidance", type=float, nargs="+", help="classifier-free guidance")
    new.add_argument("--shift", type=float, nargs="+", help="of the noise schedule")
    new.add_argument("--degradation", type=float, nargs="+", help="fresh noise mixed in")
    new.add_argument("--strength", type=float, nargs="+", help="of the noise's camera path (default 1)")
    new = command("compare", compare, "an animated picture of unseen scenes, rendered and sampled", num=12)
    add_model_options(new)

    # Figures of the twins.
    new = command("score-vae", score_vae, "the VAE against a linear codec", run=False, seed=False, num=64)
    new.add_argument("--model", type=Path, default=TINY / "wan", help="a Wan folder")
    new = command("score-depth", score_depth, "Depth Anything on held-out clips", seed=False, num=64)
    new.add_argument("--model", default=TINY / "depth_anything", help="folder or hub id")
    new = command("validate", validate, "how well each reward term tells good from bad", run=False, num=200)
    add_reward_options(new)

    # How they are made.
    def training(name, function, text):
        def run(arguments):
            function(arguments.run, arguments.minutes, arguments.seed)

        new = command(name, run, text)
        new.add_argument("--minutes", type=float, default=60, help="of training, over all resumes")

    training("vae", train.train_vae, "trains the causal 3D VAE")
    new = command("data", make_data, "renders clips and encodes them", seed=False)
    new.add_argument("--clips", type=int, default=8192, help="in all (default 8192)")
    training("dit", train.train_dit, "trains the DiT and its text encoder")
    training("web", train.train_web, "gives tiny/wan the faults of a model of web videos")
    training("depth", judges.train_depth, "trains Depth Anything's twin")
    training("critic", judges.train_critic, "trains Qwen3-VL's twin")
    training("preference", judges.train_preference, "trains HPSv3's twin")
    training("train-probe", probe.train_probe, "trains the classifier of `probe`")
    new = command("export", export, "writes what RUN has trained as it is shipped", seed=False)
    new.add_argument("--out", type=Path, default=TINY, help="the folder written")
    return parser.parse_args(argv)


def add_model_options(parser):
    parser.add_argument("--model", default=TINY / "wan", help="folder or hub id (default: the shipped one)")
    parser.add_argument("--lora", nargs="+", default=[], help="adapters' files or run folders: a row or column each")
    parser.add_argument("--frames", type=int, help="of a video, 4k+1 (default: the model's)")


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        arguments.function(arguments)
    except (ValueError, OSError) as e:
        print(f"tiny: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
