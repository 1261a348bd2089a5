"""`tuneyard init`: a manifest to start from, with the fields' descriptions as comments."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from tuneyard.api.meta import API_VERSION, yaml_fields
from tuneyard.manifests.documents import Path as FieldPath
from tuneyard.manifests.explain import name_problem
from tuneyard.manifests.fields import model_at, user_description
from tuneyard.manifests.manifest import KINDS

WIDTH = 100
_LINE = re.compile(r"(?P<indent> *)(?P<item>- )?(?P<off>#)?(?P<key>\w+):(?P<value>.*)")

HEAD = """\
# {title}
#   tuneyard validate {file}       check it
#   tuneyard plan {file}           show its stages
#   tuneyard run {file}            run it on this machine
#   kubectl apply -f {file}        run it on a cluster
# On a cluster, data and output are pvc://CLAIM/PATH, s3://... or gs://... instead of file://.
# A field after # is optional; the value is its default or an example.
"""

FINETUNE = """\
metadata:
  name: {name}
spec:
  model:
    uri: "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    #revision: main
    #tokenSecret: {{name: hf, key: token}}
  method: sft
  data:
    train:
      - uri: "file://data/train.jsonl"
        #format: auto
        #weight: 1.0
    validation:
      fraction: 0.05
    #maxLength: auto
    #onOverlength: error
    #onInvalidRow: error
    #systemPrompt: "You answer in one sentence."
  adapter:
    lora:
      rank: 16
      alpha: 32
      #targets: all-linear
  training:
    epochs: 3
    #batchSize: auto
    #learningRate: auto
    #evaluationSteps: 50
    #earlyStopping: {{patience: 3}}
    #checkpointSteps: 100
    #gradientCheckpointing: false
    #seed: 0
  evaluate:
    compareWithBase: true
    #samples: 3
    #gates: [{{metric: lossReduction, atLeast: 0.1}}]
"""

ALIGNMENT = """\
metadata:
  name: {name}
spec:
  model:
    uri: "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    #revision: main
    #tokenSecret: {{name: hf, key: token}}
  #sft: {{data: {{train: [{{uri: "file://data/train.jsonl"}}]}}}}
  #constitution: {{prompts: {{uri: "file://data/prompts.jsonl"}}}}
  preferences:
    data:
      - uri: "file://data/preferences.jsonl"
        #weight: 1.0
    heldOut: 0.1
    #maxLength: auto
    #onOverlength: error
    #onInvalidRow: error
  #rewardModel: {{train: {{}}}}
  optimize:
    dpo:
      beta: 0.1
      #loss: sigmoid
      training:
        epochs: 1
        #batchSize: auto
        #learningRate: auto
        #checkpointSteps: 100
        #seed: 0
  #rounds: 1
  adapter:
    lora:
      rank: 16
      alpha: 32
      #targets: all-linear
  #evaluate: {{gates: [{{metric: preferenceAccuracy, atLeast: 0.6}}]}}
"""

REST = """\
  output:
    uri: "file://out/{name}"
    #merge: false
    #deletionPolicy: Retain
  compute:
    workers: 1
    #gpusPerWorker: 1
    #memory: 16Gi
    #profile: small-gpu
  runPolicy:
    maxAttempts: 3
    #deadlineSeconds: 86400
    #ttlSecondsAfterFinished: 604800
    #queue: team-a
"""

_FORMS = {"finetune": ("FineTuneJob", FINETUNE), "alignment": ("AlignmentJob", ALIGNMENT)}


def manifest(kind: str, name: str, file: str) -> str:
    """Return a job's manifest. `kind`: finetune or alignment; `file`: the name of its file."""
    kind, form = _FORMS[kind]
    text = (form + REST).format(name=name)
    title = user_description(KINDS[kind].__doc__)
    head = HEAD.format(title=title, file=file)
    body = "\n".join(_commented(kind, text))
    return f"{head}apiVersion: {API_VERSION}\nkind: {kind}\n{body}\n"


def _commented(kind: str, text: str) -> Iterator[str]:
    """Yield the lines of a manifest, with each field's description before the field."""
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"no field in {line!r}")
        column = len(found["indent"]) + len(found["item"] or "")
        parents = [(at, name) for at, name in parents if at < column]
        path = tuple(name for _, name in parents)
        parents.append((column, found["key"]))
        comment = f"{found['indent']}# "
        yield from textwrap.wrap(
            _description(kind, path, found["key"]),
            width=WIDTH,
            initial_indent=comment,
            subsequent_indent=comment,
            break_on_hyphens=False,
        )
        yield line


def _description(kind: str, path: FieldPath, key: str) -> str:
    owner = model_at(KINDS[kind], path)
    if owner is None:
        raise ValueError(f"no field at {path}")
    return user_description(yaml_fields(owner)[key].description)


@click.command()
@click.argument("name", default="my-job")
@click.option(
    "--kind",
    type=click.Choice(list(_FORMS)),
    default="finetune",
    show_default=True,
    help="Kind of the job.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="File to write; - for standard output. Default: NAME.yaml.",
)
def init(name: str, kind: str, output: Path | None) -> None:
    """Write a commented manifest to start from. NAME is the job's name (default: my-job).

    An existing file is not overwritten.
    """
    if problem := name_problem(name):
        raise click.BadParameter(problem, param_hint="NAME")
    file = output or Path(f"{name}.yaml")
    if file == Path("-"):
        click.echo(manifest(kind, name, f"{name}.yaml"), nl=False)
        return
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(manifest(kind, name, str(file)))
    except FileExistsError as error:
        message = f"{file} exists already: choose another file with --output FILE, or remove it"
        raise click.ClickException(message) from error
    except OSError as error:
        message = f"{file} cannot be written ({error.strerror}): choose another with --output FILE"
        raise click.ClickException(message) from error
    click.echo(f"wrote {file}. Set model, data and output in it, then: tuneyard validate {file}")
