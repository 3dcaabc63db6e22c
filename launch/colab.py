# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pretraining without labels, in a notebook
#
# `esvit_jax` trains vision backbones on pictures alone, as in *Efficient Self-supervised Vision
# Transformers* (EsViT). This notebook trains a small one on bundled pictures of clothes, and looks
# into it: what has it learned, and where does it look? Then it does the same with photos of your
# own, and with a checkpoint that comes from elsewhere.
#
# All of it runs on a CPU, in minutes. In Colab, *Runtime → Change runtime type* gives you a GPU,
# with which you can train larger networks. What is written to `runs` is gone with the machine,
# unless you name folders of a Drive below.
#
# The next cell installs the package where it is not there yet.

# %%
import importlib.util

if importlib.util.find_spec("esvit_jax") is None:  # with a GPU: "esvit_jax[cuda] @ git+…"
    get_ipython().run_line_magic("pip", "install --quiet git+URL-OF-THIS-REPOSITORY")

# %% [markdown]
# ## Settings
#
# Name a folder of your own photos here, of any size and with or without labels (`label/photo.jpg`).
# Until you do, the bundled pictures stand in for them, and everything below still runs.

# %%
import os
import shutil

import numpy as np

import esvit_jax

RUN = "runs/quickstart"  # on a Drive that is mounted: "/content/drive/MyDrive/quickstart"
PHOTOS = os.environ.get("PHOTOS", "bundled/fashion_mnist_mini")  # yours: "folder:/content/photos"

# %% [markdown]
# ## A config, changed in Python
#
# A config is known by its name, or is a file of your own. Its fields are attributes; a name that
# does not exist, or a value that cannot work, is refused with a line that says what would do.
# Everything derived (steps, the scaled learning rate) follows when training starts.

# %%
config = esvit_jax.load_config("quickstart")
config.total_epochs = float(os.environ.get("EPOCHS", config.total_epochs))
config.log_every_steps = 10
config.linear_every_steps = 0  # k-NN is enough here: a probe of raw pixels takes a minute
print(config.views)

# %% [markdown]
# ## Training
#
# Raw pixels and the untrained network come first, to compare with. One line moves: it
# says the loss and the time that is left. Interrupt the cell, and it saves; run it again, and it
# goes on where it stopped.

# %%
result = esvit_jax.train(config, RUN)

# %% [markdown]
# ## What it sees
#
# A report has all that is known of a run, and each of its parts can be shown alone. These are the
# views of two pictures: the teacher sees the two global ones, the student all of them, and learns
# to describe each as the teacher describes the others.

# %%
report = esvit_jax.report(RUN, images=2)
report.only("images")

# %% [markdown]
# ## Curves
#
# Above the curves stands what they say about the health of the run, and which fields to change.

# %%
report.only("findings", "charts")

# %% [markdown]
# ## What it has learned: k-NN
#
# No label was used. Do pictures of one kind lie together all the same? Each test picture gets the
# label of its nearest training pictures. This is what was measured while it trained:

# %%
report.only("progress")

# %% [markdown]
# And this is how you measure it yourself, on these features or on any others; in percent.

# %%
train, test = (esvit_jax.embed(RUN, split=split) for split in ("train", "test"))
accuracy = esvit_jax.knn_accuracy(
    train.view_features, train.label, test.view_features, test.label, ks=(1, 10, 20)
)
{name: round(percent, 1) for name, percent in accuracy.items()}

# %% [markdown]
# ## Where does it look?
#
# First the regions of each stage in colours: like colours are like features. Then blocks, where a
# row is a token, marked with a cross, and a column a head: the picture glows where the head looks,
# and what is outlined holds 60 % of its attention. The last one says how widely all heads look.

# %%
looks = esvit_jax.attention(RUN, count=2)
looks.write(f"{RUN}/attention")  # for the report at the end
looks

# %% [markdown]
# ## Do regions find each other?
#
# Each picture meets its mirror image, with other colours. Regions are matched by their features
# alone; a blue line has found the place that is truly the same, an orange one has not.

# %%
matches = esvit_jax.correspond(RUN)
matches.write(RUN)
print(f"{matches.numbers[0]['accuracy']:.1f} % of the surest matches hit")
matches

# %% [markdown]
# ## Your own photos
#
# The same network goes on with your photos, in colour and twice as large. A tenth of them is left
# out of training, to look at. One epoch shows that it works; to learn something, give it a hundred.
# With a GPU and a few thousand photos take `esvit_jax.load_config("esvit_swin")`, which is the
# published recipe (Swin-T, views of 224 pixels), and set `data.name`, `batch_size` and
# `total_epochs`. A folder holds one run: for other photos, or another config, name another.

# %%
config = esvit_jax.load_config("quickstart")
config.data.name = PHOTOS
config.data.train_split, config.data.test_split = "train[:90%]", "train[90%:]"
config.data.canvas_size = 96
config.views.global_size, config.views.local_size = 56, 28
config.views.saturation, config.views.hue, config.views.grayscale = 0.2, 0.1, 0.2
config.init_from = RUN
config.total_epochs, config.batch_size, config.log_every_steps = 1, 16, 10
config.knn_every_steps = config.linear_every_steps = 0  # photos need no labels
config.knn_baselines = False
photos = esvit_jax.train(config, "runs/photos")

# %%
esvit_jax.attention("runs/photos", count=2, blocks=[-1])

# %%
esvit_jax.correspond("runs/photos", count=4)

# %% [markdown]
# ## A checkpoint from elsewhere
#
# A published checkpoint (EsViT's `.pth`, or a Swin, ViT, ViL, CvT or ResNet of timm, of
# transformers or of its authors) becomes a folder that everything above takes in place of a run:
#
#     esvit_jax.convert("checkpoint_best.pth", "runs/published")
#
# Nothing is downloaded here, so our own run is first written with the published names, and then
# takes that way. A conversion and an export make a new folder, and touch none that is there.

# %%
shutil.rmtree("exports", ignore_errors=True)
shutil.rmtree("runs/converted", ignore_errors=True)
esvit_jax.export(RUN, "exports/esvit", format="esvit")
found = esvit_jax.convert("exports/esvit/checkpoint.safetensors", "runs/converted")
print(*found, sep="\n")

# %%
esvit_jax.attention("runs/converted", data=PHOTOS, count=1, blocks=[-1])

# %% [markdown]
# ## Backbones for other programs
#
# `stablehlo` is one compiled program that needs jax and nothing of this package; `timm` and
# `huggingface` are read by those libraries. What is written is read again and compared before its
# folder gets its name.

# %%
checks = esvit_jax.export(RUN, "exports/stablehlo", format="stablehlo")
print(checks)
backbone, variables, preprocess = esvit_jax.load("exports/stablehlo")
picture = np.zeros((28, 28, 3), np.uint8)  # or the path of a photo
out = backbone.apply(variables, preprocess([picture]))
print("view features", out.view_features.shape, "region features", out.region_features.shape)

# %% [markdown]
# ## All of it on one page
#
# The page is one file that loads nothing from anywhere: take it along.

# %%
report = esvit_jax.report(RUN)
report.write("report.html")
report
