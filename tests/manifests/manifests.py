"""Valid manifests that together set every field, and invalid manifests made from them.

The reader (tested here) and a real API server (tests/apiserver) must refuse each invalid one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

Manifest = dict[str, Any]

ABSENT = object()
"""The value, in `changed`, of a field to remove."""


def steps(path: str) -> list[str | int]:
    """Return the keys and indices of a path such as `spec.data.train[0].uri`."""
    parts = re.findall(r"[^.\[\]]+", path)
    return [int(part) if part.isdigit() else part for part in parts]


def value_at(manifest: Any, path: str) -> Any:
    for step in steps(path):
        manifest = manifest[step]
    return manifest


def changed(manifest: Manifest, changes: dict[str, Any]) -> Manifest:
    """Return a copy in which the fields at these paths have these values."""
    result = copy.deepcopy(manifest)
    for path, value in changes.items():
        *parents, last = steps(path)
        here: Any = result
        for step in parents:
            here = here.setdefault(step, {}) if isinstance(here, dict) else here[step]
        if value is ABSENT:
            del here[last]
        else:
            here[last] = value
    return result


def job(kind: str, spec: str) -> Manifest:
    """Return a job of this kind; `spec` is YAML."""
    return {
        "apiVersion": "tuneyard.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": "job"},
        "spec": yaml.safe_load(spec),
    }


MINIMAL = job(
    "FineTuneJob",
    """
    model: {uri: "hf://org/model"}
    data: {train: [{uri: "file://train.jsonl"}]}
    output: {uri: "file://out"}
    """,
)

LORA = job(
    "FineTuneJob",
    """
    model:
      uri: hf://org/model
      revision: main
      tokenSecret: {name: hub, key: token}
      credentials: {name: store}
    method: sft
    data:
      train:
      - uri: file://train.jsonl
        format: alpaca
        fields:
          {messages: m, system: s, prompt: p, input: i, completion: c, text: t, history: h,
           tools: u, reasoning: r, expected: e, role: o, content: w, chosen: b, rejected: z,
           answers: a, ranks: k, scores: q, label: l, document: d, event: v, id: g, of: f, by: x,
           session: j, answer: aa, rank: ab, score: ac, scoreChosen: ad, scoreRejected: ae,
           probability: af, instances: ag, parent: ah, replies: ai, deleted: aj, reviewed: ak}
        paths: all
        weight: 2.0
        limit: 100
        tokenSecret: {name: hub, key: token}
        credentials: {name: store}
      validation: {fraction: 0.05}
      maxLength: 512
      onOverlength: split
      onInvalidRow: skip
      packing: never
      trainOn: all
      reasoning: drop
      systemPrompt: Be brief.
      chatTemplate: "{{ messages }}"
      clean:
        duplicates: near
        similarity: 0.9
        repairEncoding: true
        languages: [en, de]
        minWords: 3
        maxWords: 5000
        quality: [repetition, gopher, fineweb]
        personalData: {email: redact, phone: report, card: drop, iban: ignore, key: drop}
        toxicity:
          classifier:
            uri: hf://org/classifier
            revision: main
            tokenSecret: {name: hub, key: token}
            credentials: {name: store}
          labels: [toxic, threat]
          threshold: 0.7
          treatment: drop
      leaks: error
      temperature: 2.0
      replay:
        data: [{uri: "pvc://data/general.jsonl", weight: 2.0}]
        share: 0.2
      fillInTheMiddle:
        rate: 0.4
        mode: psm
        markers: {prefix: "<P>", suffix: "<S>", middle: "<M>"}
      retrieval:
        documents:
          uri: file://documents
          fields: {id: name, text: body}
          tokenSecret: {name: hub, key: token}
          credentials: {name: store}
        passages: 5
        goldShare: 0.5
        passageWords: 80
        cite: false
      augment:
        by:
          endpoint:
            url: https://writer.example/v1
            model: writer
            key: {name: writer, key: token}
            maxRequests: 1000
            maxTokens: 100000
            concurrency: 4
            timeoutSeconds: 30
            maxAttempts: 3
            labelTokens: 16
        paraphrase: {perRow: 2, share: 0.5, requests: ["Rewrite {prompt}", "Shorten {prompt}"]}
        inversion: {share: 0.2, request: "What is answered by {answer}?"}
        templates: ["Question: {prompt}"]
        weight: 0.5
        maxNewTokens: 64
    adapter:
      lora:
        rank: 8
        alpha: 16
        dropout: 0.1
        targets: attention
        layers: "0-3,8"
        rankStabilized: true
        decomposed: true
    training:
      epochs: 3
      batchSize: 16
      microBatchTokens: 2048
      learningRate: 0.0002
      schedule: {type: linear, warmup: 0.1, finalFraction: 0.0}
      optimizer: {weightDecay: 0.1, beta1: 0.8, beta2: 0.95, epsilon: 1.0e-6, maxGradientNorm: 2}
      dropout: 0.1
      precision: float32
      gradientCheckpointing: true
      evaluationSteps: 50
      earlyStopping: {patience: 3, minDelta: 0.01}
      keepBest: false
      checkpointSteps: 100
      seed: 7
    evaluate:
      compareWithBase: false
      samples: 5
      maxNewTokens: 32
      fewShot: 4
      engine: vllm
      suites:
        - name: sense
          choices: {uri: "s3://suites/sense.jsonl", credentials: {name: store}}
          limit: 100
        - name: manners
          refusals: {uri: "hf://org/manners/rows.csv", tokenSecret: {name: hf, key: token}}
        - name: arc
          task: {name: arc_easy, fewShot: 5, chatTemplate: true}
        - name: mine
          task:
            file: {uri: "file://mine.yaml"}
            data: {uri: "file://rows.jsonl"}
        - name: capitals
          answers:
            uri: file://capitals.jsonl
            tokenSecret: {name: hf, key: token}
            credentials: {name: store}
            metrics: [exactMatch, rouge]
            answerSchema: '{"type": "string"}'
            answerPattern: "[A-Z]"
            maxNewTokens: 32
      gates:
        - {metric: lossReduction, atLeast: 0.3, atMost: 1.0, tier: advisory, minItems: 30}
        - {metric: validationLoss, notWorseThanBaseBy: 0.02}
      metrics: [exactMatch, tokenF1, rouge, bleu, chrf, json, classification, numeric]
      answerSchema: '{"type": "object"}'
      answerPattern: "^[0-9]+$"
      winRate:
        judge: {model: {uri: "hf://org/judge"}}
        principles: [Be kind.]
        question: "{first} or {second}?"
    output:
      uri: pvc://models/job
      merge: true
      deletionPolicy: Delete
      credentials: {name: store}
    compute:
      profile: a100-small
      workers: 4
      minWorkers: 2
      gpusPerWorker: 1
      cpusPerWorker: "8"
      memory: 64Gi
      sharedMemory: 8Gi
      temporaryStorage: 500Gi
      cacheClaim: cache
      gpu: A100-80GB
      pricePerHour: 3.5
      gpuResource: nvidia.com/gpu
      nodeSelector: {accelerator: a100}
      tolerations:
      - {key: gpu, operator: Equal, value: "true", effect: NoExecute, tolerationSeconds: 60}
      priorityClass: batch
      image: trainer:1
    tracking:
      mlflow:
        uri: http://mlflow.mlflow:5000
        experiment: support-bot
        runName: first
        tokenSecret: {name: mlflow, key: token}
        tags: {team: support}
      tensorboard: {uri: pvc://logs/job}
    runPolicy:
      cancel: false
      suspend: true
      maxAttempts: 5
      backoffSeconds: 20
      deadlineSeconds: 86400
      startDeadlineSeconds: 600
      ttlSecondsAfterFinished: 604800
      queue: team-a
      prepareQueue: cpus
      workloadPriority: high
    """,
)

FULL_TUNING = job(
    "FineTuneJob",
    """
    model: {uri: "job://earlier"}
    method: pretrain
    data:
      train: [{uri: "s3://bucket/text.parquet"}]
      validation: {data: [{uri: "pvc://data/held-out.jsonl"}]}
    training:
      engine: trl
      trl: {torch_compile: true, neftune_noise_alpha: 5}
      maxSteps: 100
      learningRate: auto
      freeze: {layers: "0-11", embeddings: true, head: true}
      optimizer: {maxGradientNorm: null}
    output: {uri: "gs://bucket/job"}
    compute: {workers: 2, sharding: fsdp}
    """,
)

QLORA = changed(
    MINIMAL,
    {
        "spec.adapter.qlora": {
            **LORA["spec"]["adapter"]["lora"],
            "targets": ["q_proj"],
            "doubleQuantization": False,
        }
    },
)
PREFIX = changed(MINIMAL, {"spec.adapter.prefix.length": 10})
PROMPT = changed(MINIMAL, {"spec.adapter.prompt": {"length": 10, "initialText": "Be brief."}})
IA3 = changed(MINIMAL, {"spec.adapter.ia3": {}})
BOTTLENECK = changed(
    MINIMAL,
    {"spec.adapter.bottleneck": {"size": 8, "activation": "relu", "dropout": 0, "layers": "0"}},
)

DEFENDED = changed(
    MINIMAL,
    {
        "spec.data.validation": {"fraction": 0.1},
        "spec.evaluate.suites": [{"name": "sense", "choices": {"uri": "pvc://data/sense.jsonl"}}],
        "spec.training": {
            "bestBy": "generalLoss",
            "suites": [{"name": "sense", "limit": 50}],
            "preserve": {
                "data": [{"uri": "pvc://data/general.jsonl"}],
                "l2Sp": {"strength": 0.1},
                "ewc": {"strength": 50.0, "samples": 32},
                "kl": {"strength": 0.5, "temperature": 2.0, "batchSize": 8},
            },
            "guard": {
                "data": [{"uri": "pvc://data/watched.jsonl"}],
                "worsensBy": 0.2,
                "patience": 2,
            },
        },
    },
)

DPO = job(
    "AlignmentJob",
    """
    model: {uri: "hf://org/model"}
    sft:
      data: {train: [{uri: "file://train.jsonl"}]}
      training: {epochs: 1}
    preferences:
      data: [{uri: "file://pairs.jsonl"}]
      heldOut: 0.2
      maxLength: 512
      onOverlength: drop
      onInvalidRow: skip
      reasoning: drop
    optimize:
      dpo: {loss: ipo, beta: 0.2, labelSmoothing: 0.1, training: {epochs: 1}}
    rounds: 2
    adapter: {lora: {}}
    evaluate: {samples: 0}
    output: {uri: "file://out"}
    compute: {workers: 1}
    runPolicy: {maxAttempts: 1}
    """,
)

DPO_BY_TRL = changed(
    DPO,
    {
        "spec.evaluate.suites": [{"name": "sense", "choices": {"uri": "file://sense.jsonl"}}],
        "spec.leaks": "error",
        "spec.adapter": ABSENT,
        "spec.optimize.dpo.training": {
            "engine": "trl",
            "trl": {"torch_compile": True},
            "epochs": 1,
            "freeze": {"embeddings": True},
            "batchSize": 8,
            "microBatchTokens": 2048,
            "learningRate": 1e-4,
            "schedule": {"type": "constant"},
            "optimizer": {"weightDecay": 0.1},
            "dropout": 0.1,
            "precision": "float32",
            "gradientCheckpointing": True,
            "evaluationSteps": 50,
            "earlyStopping": {"patience": 2},
            "keepBest": True,
            "suites": [{"name": "sense", "limit": 50}],
            "bestBy": "preferenceAccuracy",
            "checkpointSteps": 100,
            "seed": 3,
        },
    },
)

PPO = job(
    "AlignmentJob",
    """
    model: {uri: "hf://org/model"}
    preferences:
      aiFeedback:
        judge:
          endpoint:
            url: https://judge.example/v1
            model: judge
            key: {name: judge, key: token}
            maxRequests: 1000
            maxTokens: 100000
            concurrency: 4
            timeoutSeconds: 30
            maxAttempts: 3
            labelTokens: 512
        prompts:
          uri: file://prompts.jsonl
          format: text
          fields: {prompt: p}
          limit: 100
          reasoning: drop
          tokenSecret: {name: hub, key: token}
          credentials: {name: store}
        principles: [Be kind.]
        responsesPerPrompt: 4
        temperature: 0.7
        maxNewTokens: 128
        question: "{first} or {second}?"
        disagreement: tie
    rewardModel:
      train: {adapter: {lora: {}}, training: {epochs: 1}, margin: 0.5, centering: 0.01}
    optimize:
      ppo:
        prompts: {uri: "file://prompts.jsonl"}
        sampling: {temperature: 0.7, topP: 0.9, maxNewTokens: 64, engine: vllm}
        rollouts: 32
        optimizationEpochs: 2
        clipRange: 0.1
        valueClipRange: 0.1
        valueCoefficient: 0.5
        entropyCoefficient: 0.01
        discount: 0.99
        gaeLambda: 0.9
        klCoefficient: 0.1
        targetKl: 6.0
        missingEosPenalty: 2.0
        training: {maxSteps: 10}
        stopOn: {maxKl: 20, minEntropy: 0.1, maxLengthRatio: 3}
    output: {uri: "file://out"}
    tracking: {tensorboard: {}}
    """,
)

GRPO = job(
    "AlignmentJob",
    """
    model: {uri: "hf://org/model"}
    constitution:
      prompts: {uri: "file://red-team.jsonl"}
      principles: [Be kind.]
      revisions: 2
      judge: {model: {uri: "hf://org/judge"}}
      critiqueRequest: "What breaks {principle}?"
      revisionRequest: "Rewrite it by {principle}."
      maxNewTokens: 128
      training: {epochs: 1}
    rewardModel: {model: {uri: "hf://org/reward"}}
    rewardTerms:
      - {weight: 0.5, rule: {exactMatch: answer}}
      - {weight: -1.0, model: {uri: "hf://org/toxicity"}}
    independentReward: {model: {uri: "hf://org/gold"}}
    optimize:
      grpo:
        prompts: {uri: "file://prompts.jsonl"}
        sampling: {temperature: 0.7}
        groupSize: 4
        klCoefficient: 0.0
        clipRange: 0.1
        training: {maxSteps: 10}
        stopOn: {maxKl: 20}
    evaluate:
      compareWithBase: false
      samples: 5
      maxNewTokens: 32
      fewShot: 4
      engine: vllm
      suites: [{name: arc, task: {name: arc_easy}}]
      gates: [{metric: winRate, atLeast: 0.5}]
      winRate:
        judge: {model: {uri: "hf://org/judge"}}
        principles: [Be kind.]
        question: "{first} or {second}?"
    output: {uri: "file://out"}
    """,
)

RLOO = job(
    "AlignmentJob",
    """
    model: {uri: "hf://org/model"}
    rewardModel: {rule: {exactMatch: answer}}
    optimize:
      rloo:
        prompts: {uri: "file://prompts.jsonl"}
        sampling: {temperature: 0.7}
        groupSize: 4
        klCoefficient: 0.1
        clipRange: 0.1
        training: {maxSteps: 10}
        stopOn: {maxKl: 20}
    output: {uri: "file://out"}
    """,
)
DISTILL = job(
    "AlignmentJob",
    """
    model: {uri: "hf://org/small"}
    optimize:
      distill:
        teacher:
          uri: "hf://org/large"
          revision: main
          tokenSecret: {name: hf, key: token}
        prompts: {uri: "file://prompts.jsonl"}
        sampling: {temperature: 0.7}
        beta: 0.5
        training:
          engine: trl
          trl: {top_k: 50}
          epochs: 2
          batchSize: 16
          microBatchTokens: 4096
          learningRate: 0.0001
          schedule: {type: linear}
          optimizer: {weightDecay: 0.1}
          dropout: 0.1
          freeze: {layers: "0-3"}
          precision: float32
          gradientCheckpointing: true
          evaluationSteps: 10
          earlyStopping: {patience: 2}
          keepBest: false
          checkpointSteps: 10
          seed: 1
    output: {uri: "file://out"}
    """,
)
SENSE = {"name": "sense", "choices": {"uri": "file://sense.jsonl"}}
DISTILL_STEPS = changed(
    DISTILL,
    {
        "spec.evaluate.suites": [SENSE],
        "spec.optimize.distill.training": {
            "maxSteps": 10,
            "bestBy": "validationLoss",
            "suites": [{"name": "sense"}],
        },
    },
)
RULE_REWARD = changed(
    RLOO,
    {
        "spec.rewardModel.rule": {"jsonSchema": "{}"},
        "spec.independentReward": {"rule": {"exactMatch": "gold"}},
    },
)

VALID = {
    "minimal": MINIMAL,
    "lora": LORA,
    "full-tuning": FULL_TUNING,
    "qlora": QLORA,
    "prefix": PREFIX,
    "prompt": PROMPT,
    "ia3": IA3,
    "bottleneck": BOTTLENECK,
    "defended": DEFENDED,
    "dpo": DPO,
    "dpo-by-trl": DPO_BY_TRL,
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "distill": DISTILL,
    "distill-steps": DISTILL_STEPS,
    "rule-reward": RULE_REWARD,
}


class BrokenRule(NamedTuple):
    """A manifest that breaks one rule across fields."""

    name: str
    manifest: Manifest
    path: str
    """The field that is reported."""
    message: str
    """The reason and the remedy; the reader and the API server give the same message."""


def _one_of(name: str, base: Manifest, path: str, value: Any, members: str) -> BrokenRule:
    return BrokenRule(name, changed(base, {path: value}), path, f"set exactly one of {members}")


_ADAPTERS = "lora, qlora, prefix, prompt, ia3, bottleneck"
_OPTIMIZE = "dpo, ppo, grpo, rloo, distill"
_PROMPTS = {"prompts": {"uri": "file://prompts.jsonl"}}
_NEEDS_PREFERENCES = "needs preferences: add preferences.data or preferences.aiFeedback"

BROKEN_RULES = [
    _one_of("two-adapters", MINIMAL, "spec.adapter", {"lora": {}, "qlora": {}}, _ADAPTERS),
    _one_of("no-adapter", MINIMAL, "spec.adapter", {}, _ADAPTERS),
    _one_of(
        "two-validations",
        MINIMAL,
        "spec.data.validation",
        {"fraction": 0.1, "data": [{"uri": "file://v.jsonl"}]},
        "fraction, data",
    ),
    BrokenRule(
        "no-term-against-forgetting",
        changed(MINIMAL, {"spec.training": {"preserve": {}}}),
        "spec.training.preserve",
        "set at least one of l2Sp, ewc, kl",
    ),
    BrokenRule(
        "no-general-data",
        changed(MINIMAL, {"spec.training": {"preserve": {"kl": {}}}}),
        "spec.training.preserve.data",
        "is the general data of ewc and kl: set it with either of them, and only then",
    ),
    BrokenRule(
        "unread-general-data",
        changed(
            MINIMAL,
            {"spec.training": {"preserve": {"l2Sp": {}, "data": [{"uri": "file://g.jsonl"}]}}},
        ),
        "spec.training.preserve.data",
        "is the general data of ewc and kl: set it with either of them, and only then",
    ),
    BrokenRule(
        "a-guard-that-keeps-the-last",
        changed(
            MINIMAL,
            {
                "spec.training": {
                    "guard": {"data": [{"uri": "file://g.jsonl"}]},
                    "keepBest": False,
                }
            },
        ),
        "spec.training.guard",
        "needs the weights before the bound was crossed: remove keepBest or guard",
    ),
    BrokenRule(
        "similarity-of-exact-duplicates",
        changed(MINIMAL, {"spec.data.clean": {"duplicates": "exact", "similarity": 0.9}}),
        "spec.data.clean.similarity",
        "applies to near duplicates only: set duplicates: near, or remove similarity",
    ),
    BrokenRule(
        "fewest-words-above-most",
        changed(MINIMAL, {"spec.data.clean": {"minWords": 9, "maxWords": 8}}),
        "spec.data.clean.minWords",
        "must be at most maxWords: lower minWords, or raise maxWords",
    ),
    BrokenRule(
        "retrieval-in-pre-training",
        changed(
            MINIMAL,
            {
                "spec.method": "pretrain",
                "spec.data.retrieval": {"documents": {"uri": "file://documents"}},
            },
        ),
        "spec.data.retrieval",
        "puts passages before questions, which method pretrain does not have: set method: sft, or "
        "remove data.retrieval",
    ),
    BrokenRule(
        "augmentation-in-pre-training",
        changed(
            MINIMAL,
            {"spec.method": "pretrain", "spec.data.augment": {"templates": ["Q: {prompt}"]}},
        ),
        "spec.data.augment",
        "rewrites questions, which method pretrain does not have: set method: sft, or remove "
        "data.augment",
    ),
    BrokenRule(
        "an-empty-augmentation",
        changed(MINIMAL, {"spec.data.augment": {"weight": 2.0}}),
        "spec.data.augment",
        "set at least one of paraphrase, inversion, templates",
    ),
    BrokenRule(
        "a-writer-of-nothing",
        changed(
            MINIMAL,
            {
                "spec.data.augment": {
                    "by": {"model": {"uri": "hf://org/writer"}},
                    "templates": ["Q: {prompt}"],
                }
            },
        ),
        "spec.data.augment.by",
        "writes paraphrases and questions, and neither is asked for: set paraphrase or inversion, "
        "or remove by",
    ),
    _one_of(
        "no-writer",
        changed(MINIMAL, {"spec.data.augment": {"paraphrase": {}}}),
        "spec.data.augment.by",
        {},
        "model, endpoint",
    ),
    _one_of("no-reward", RLOO, "spec.rewardModel", {}, "train, model, rule"),
    _one_of("no-rule", RLOO, "spec.rewardModel.rule", {}, "exactMatch, jsonSchema"),
    _one_of("an-empty-term", GRPO, "spec.rewardTerms[0]", {"weight": 2.0}, "model, rule"),
    BrokenRule(
        "terms-without-a-reward",
        changed(DPO, {"spec.rewardTerms": [{"rule": {"jsonSchema": "{}"}}]}),
        "spec.rewardTerms",
        "are added to the reward of rewardModel, which is not set: set rewardModel",
    ),
    _one_of("no-independent", GRPO, "spec.independentReward", {}, "model, rule"),
    BrokenRule(
        "independent-of-nothing",
        changed(
            GRPO,
            {
                "spec.independentReward": {"rule": {"exactMatch": "answer"}},
                "spec.optimize": ABSENT,
                "spec.rewardTerms": ABSENT,
            },
        ),
        "spec.independentReward",
        "is measured on an aligned model, and optimize is not set: set optimize, or remove "
        "independentReward",
    ),
    _one_of("no-judge", PPO, "spec.preferences.aiFeedback.judge", {}, "model, endpoint"),
    BrokenRule(
        "question-without-completions",
        changed(PPO, {"spec.preferences.aiFeedback.question": "Is {first} good?"}),
        "spec.preferences.aiFeedback.question",
        "must contain {first} and {second}, where the two completions are inserted: add both",
    ),
    _one_of("no-second-judge", GRPO, "spec.evaluate.winRate.judge", {}, "model, endpoint"),
    BrokenRule(
        "win-rate-question-without-completions",
        changed(GRPO, {"spec.evaluate.winRate.question": "Is {first} good?"}),
        "spec.evaluate.winRate.question",
        "must contain {first} and {second}, where the two completions are inserted: add both",
    ),
    _one_of("no-preferences", DPO, "spec.preferences", {}, "data, aiFeedback"),
    _one_of("two-optimizers", DPO, "spec.optimize", {"dpo": {}, "grpo": _PROMPTS}, _OPTIMIZE),
    BrokenRule(
        "revision-of-a-file",
        changed(MINIMAL, {"spec.model": {"uri": "file://model", "revision": "main"}}),
        "spec.model.revision",
        "applies to hf:// models only: remove revision, or name an hf:// model",
    ),
    BrokenRule(
        "frozen-layers-under-an-adapter",
        changed(MINIMAL, {"spec.adapter.lora": {}, "spec.training.freeze.layers": "0-3"}),
        "spec.training.freeze",
        "applies to full fine-tuning only, as an adapter freezes the whole base model: remove "
        "training.freeze or adapter",
    ),
    BrokenRule(
        "early-stopping-without-held-out-rows",
        changed(MINIMAL, {"spec.training.earlyStopping": {}}),
        "spec.training.earlyStopping",
        "needs held-out rows: set data.validation, or training.bestBy to a metric of a suite, or "
        "remove training.earlyStopping",
    ),
    BrokenRule(
        "early-stopping-without-held-out-rows-before-alignment",
        changed(DPO, {"spec.sft.training.earlyStopping": {}}),
        "spec.sft.training.earlyStopping",
        "needs held-out rows: set data.validation, or training.bestBy to a metric of a suite, or "
        "remove training.earlyStopping",
    ),
    BrokenRule(
        "gates-without-held-out-rows",
        changed(MINIMAL, {"spec.evaluate.gates": [{"metric": "lossReduction", "atLeast": 0.3}]}),
        "spec.evaluate.gates",
        "need held-out rows or suites: set data.validation or evaluate.suites, or remove "
        "evaluate.gates",
    ),
    BrokenRule(
        "a-suite-of-two-kinds",
        changed(LORA, {"spec.evaluate.suites[0].task": {"name": "arc_easy"}}),
        "spec.evaluate.suites[0]",
        "set exactly one of choices, answers, refusals, task",
    ),
    BrokenRule(
        "a-task-of-the-harness-and-of-a-file",
        changed(LORA, {"spec.evaluate.suites[3].task.name": "arc_easy"}),
        "spec.evaluate.suites[3].task",
        "set exactly one of name and file",
    ),
    BrokenRule(
        "a-task-file-without-rows",
        changed(LORA, {"spec.evaluate.suites[3].task.data": ABSENT}),
        "spec.evaluate.suites[3].task",
        "a task file has its rows in data: set both file and data, or neither",
    ),
    BrokenRule(
        "a-suite-of-answers-without-a-metric",
        changed(LORA, {"spec.evaluate.suites[4].answers": {"uri": "file://capitals.jsonl"}}),
        "spec.evaluate.suites[4].answers",
        "measures nothing: set metrics, answerSchema or answerPattern",
    ),
    BrokenRule(
        "a-gate-without-a-bound",
        changed(LORA, {"spec.evaluate.gates[0]": {"metric": "lossReduction"}}),
        "spec.evaluate.gates[0]",
        "has no bound: set atLeast, atMost or both, or notWorseThanBaseBy",
    ),
    BrokenRule(
        "a-gate-with-bounds-of-two-kinds",
        changed(
            LORA,
            {
                "spec.evaluate.gates[0]": {
                    "metric": "validationLoss",
                    "atMost": 2.0,
                    "notWorseThanBaseBy": 0.1,
                }
            },
        ),
        "spec.evaluate.gates[0]",
        "bounds a difference and a value: write two gates, one with notWorseThanBaseBy and one "
        "with atLeast or atMost",
    ),
    BrokenRule(
        "a-merge-of-bottlenecks",
        changed(BOTTLENECK, {"spec.output.merge": True}),
        "spec.output.merge",
        "needs one of the adapters lora, qlora, ia3, as the others are not linear in the base "
        "weights: remove output.merge or change the adapter",
    ),
    BrokenRule(
        "a-merge-of-prefixes-after-alignment",
        changed(DPO, {"spec.adapter": {"prefix": {}}, "spec.output.merge": True}),
        "spec.output.merge",
        "needs one of the adapters lora, qlora, ia3, as the others are not linear in the base "
        "weights: remove output.merge or change the adapter",
    ),
    BrokenRule(
        "epochs-and-steps",
        changed(MINIMAL, {"spec.training": {"epochs": 1, "maxSteps": 10}}),
        "spec.training.maxSteps",
        "cannot be combined with epochs: remove maxSteps or epochs",
    ),
    BrokenRule(
        "more-minimum-workers-than-workers",
        changed(MINIMAL, {"spec.compute": {"workers": 2, "minWorkers": 4}}),
        "spec.compute.minWorkers",
        "must not exceed workers: lower minWorkers or raise workers",
    ),
    BrokenRule(
        "tracking-without-a-tracker",
        changed(MINIMAL, {"spec.tracking": {}}),
        "spec.tracking",
        "names no tracker: set mlflow or tensorboard, or remove tracking",
    ),
    BrokenRule(
        "a-tag-that-mlflow-does-not-accept",
        changed(
            MINIMAL,
            {"spec.tracking": {"mlflow": {"uri": "http://mlflow:5000", "tags": {"a:b": ""}}}},
        ),
        "spec.tracking.mlflow.tags",
        "have a name that MLflow does not accept: use at most 250 letters, digits, spaces and -_./",
    ),
    BrokenRule(
        "a-priority-without-a-queue",
        changed(MINIMAL, {"spec.runPolicy.workloadPriority": "high"}),
        "spec.runPolicy.workloadPriority",
        "needs a queue: set queue to the Kueue LocalQueue, or remove workloadPriority",
    ),
    BrokenRule(
        "a-prefix-reward-model",
        changed(PPO, {"spec.rewardModel.train.adapter": {"prefix": {}}}),
        "spec.rewardModel.train.adapter",
        "must be lora or qlora for a reward model: change it, or remove it for full fine-tuning",
    ),
    BrokenRule(
        "a-frozen-reward-model-under-an-adapter",
        changed(PPO, {"spec.rewardModel.train.training.freeze": {"head": True}}),
        "spec.rewardModel.train.training.freeze",
        "applies to full fine-tuning only, as an adapter freezes the whole base model: remove "
        "training.freeze or adapter",
    ),
    BrokenRule(
        "an-alignment-without-steps",
        changed(RLOO, {"spec.rewardModel": ABSENT, "spec.optimize": ABSENT}),
        "spec",
        "nothing to do: set sft, constitution, rewardModel or optimize",
    ),
    BrokenRule(
        "dpo-without-preferences",
        changed(DPO, {"spec.preferences": ABSENT}),
        "spec.optimize.dpo",
        _NEEDS_PREFERENCES,
    ),
    BrokenRule(
        "a-reward-model-without-preferences",
        changed(PPO, {"spec.preferences": ABSENT}),
        "spec.rewardModel.train",
        _NEEDS_PREFERENCES,
    ),
    BrokenRule(
        "grpo-without-a-reward",
        changed(GRPO, {"spec.rewardModel": ABSENT, "spec.rewardTerms": ABSENT}),
        "spec.optimize",
        "ppo, grpo and rloo need a reward: add rewardModel, or optimize by dpo or distill",
    ),
    BrokenRule(
        "rounds-without-optimize",
        changed(DPO, {"spec.optimize": ABSENT}),
        "spec.rounds",
        "must be 1 without optimize: add optimize or remove rounds",
    ),
]


class BrokenField(NamedTuple):
    """A manifest with one field that the schema refuses."""

    name: str
    manifest: Manifest
    path: str


def broken_fields(crds: dict[str, dict[str, Any]]) -> Iterator[BrokenField]:
    """Yield each way to break every field of every model, at its first occurrence."""
    known: set[str] = set()
    for manifest in VALID.values():
        crd = next(crd for crd in crds.values() if crd["spec"]["names"]["kind"] == manifest["kind"])
        schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for path, field in _filled(schema["properties"]["spec"], manifest["spec"], "spec"):
            identity = f"{path.rsplit('.', 1)[-1]}: {field}"
            if identity in known:
                continue
            known.add(identity)
            for what, changes in _breaks(field, value_at(manifest, path), path):
                reported = next(iter(changes))
                name = f"{manifest['kind']}-{path}-{what}"
                yield BrokenField(name, changed(manifest, changes), reported)


def _filled(schema: Manifest, value: Any, path: str) -> Iterator[tuple[str, Manifest]]:
    yield path, schema
    if isinstance(value, list) and value and "items" in schema:
        yield from _filled(schema["items"], value[0], f"{path}[0]")
    if isinstance(value, dict) and "properties" in schema:
        for name, item in value.items():
            if item is not None:
                yield from _filled(schema["properties"][name], item, f"{path}.{name}")


Changes = dict[str, Any]


def _breaks(schema: Manifest, value: Any, path: str) -> Iterator[tuple[str, Changes]]:
    """Yield each way to break one field: its name and the changes; the first one is reported."""
    kind = schema.get("type")
    yield from _wrong_types(schema, value, path)
    least, most = schema.get("minimum"), schema.get("maximum")
    takes_numbers = least is None or most is None or least < most
    if least is not None and takes_numbers:
        yield "minimum", {path: least - (not schema.get("exclusiveMinimum"))}
    if most is not None and takes_numbers:
        yield "maximum", {path: most + (not schema.get("exclusiveMaximum"))}
    for validation in schema.get("x-kubernetes-validations", ()):
        if validation["rule"].startswith("self < "):
            yield "maximum", {path: float(validation["rule"].removeprefix("self < "))}
    if "enum" in schema or "pattern" in schema:
        yield "words", {path: "wrong words"}
    for name in schema.get("required", ()):
        yield f"without-{name}", {f"{path}.{name}": ABSENT}
    if "properties" in schema or (kind == "object" and not value):
        yield "unknown", {f"{path}.nonsense": 1}
    yield from _wrong_sizes(schema, value, path)


def _wrong_types(schema: Manifest, value: Any, path: str) -> Iterator[tuple[str, Changes]]:
    if "type" in schema:
        yield "type", {path: 5 if schema["type"] == "string" else "wrong words"}
    if "not" in schema:
        takes_numbers = isinstance(value, float)
        for wrong in (True, False, {}, {"a": 1}, [], [5] if takes_numbers else 5):
            yield f"type-{wrong}", {path: wrong}


def _wrong_sizes(schema: Manifest, value: Any, path: str) -> Iterator[tuple[str, Changes]]:
    kind = schema.get("type")
    if schema.get("minLength"):
        yield "too-short", {path: ""}
    if "maxLength" in schema:
        yield "too-long", {path: "x" * (schema["maxLength"] + 1)}
    if schema.get("minItems"):
        yield "too-few", {path: []}
    if "maxItems" in schema and kind == "array":
        yield "too-many", {path: [value[0]] * (schema["maxItems"] + 1)}
    if "maxProperties" in schema and kind == "object":
        many = {f"key-{number}": "x" for number in range(schema["maxProperties"] + 1)}
        yield "too-many", {path: many}
