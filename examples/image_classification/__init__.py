"""Train the paper's networks, with its recipe, by HERO and its rivals.

    python -m examples.image_classification digits --epochs 5
    python -m examples.image_classification cifar10_resnet20_hero --data-dir DIR

All devices of the machine share the work; `--distributed` joins several hosts, each of
which runs the same command.

The first argument is a TOML file, or a name (see named.py): there is one for each
number in the paper's tables; every field of `Config` is an option, and `--help`
explains them all. A run writes to a folder of its own:

    config.toml          all that determines the numbers, to be run again
    metrics.csv          one row per epoch, explained in logbook.py; times.csv: seconds
    tensorboard/         the same for TensorBoard
    checkpoints/         written every epoch; the same command resumes a killed run
    weights.safetensors  the last weights and BatchNorm statistics
    weights.json         what else it takes to use them: classes, mean, size of images
    result.json          accuracy at every precision, versions, machine, command

The exit status is 0 if the run is finished, and 75 if it was stopped (by SIGTERM,
Ctrl-C or `--minutes`) and has saved its state.

`python -m examples.image_classification.predict RUN IMAGES` says what a network sees,
`python -m examples.experiments.sweep` searches h and gamma,
`python -m examples.experiments.reproduction` computes the paper's tables and
figures, and `python -m examples.experiments.speed.recipe` measures pipeline and step.

To start a project of your own, copy this folder.
"""
