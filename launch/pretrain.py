"""Pretrain a low-rank language model.

torchrun --nproc_per_node=2 launch/pretrain.py model=llama_60m param=sltrain train.steps=1000
torchrun --nproc_per_node=2 launch/pretrain.py -m param=sltrain param.rank=16,32,64
python launch/pretrain.py --help
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

# Imports create millions of long-lived objects: 8.6 instead of 9.5 s of CPU time until a run starts.
gc.set_threshold(20_000, 20, 20)

SHOW_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"
os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise errors instead of printing them
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lrtrain.core.streams import never_fail_to_print

never_fail_to_print()

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lrtrain.config.check import check, check_directories
from lrtrain.config.compose import composition_sentence, typed
from lrtrain.config.home import add_homes_of, search_homes
from lrtrain.config.naming import run_name
from lrtrain.data.prepare import check_data
from lrtrain.distributed.world import environment_rank, environment_world_size, first_to_say
from lrtrain.errors import ConfigError, RunFailed
from lrtrain.planning.budget import spend
from lrtrain.sweeps.jobs import FAILURE
from lrtrain.sweeps.report import SweepFailed


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="pretrain")
def main(composed: DictConfig) -> None:
    """Run one job; errors in its configuration are printed as one sentence."""
    try:
        job(composed)
    except ConfigError as error:
        fail(error, str(error), code=2)
    except RunFailed as error:
        fail(error, str(error), code=1)


def job(composed: DictConfig) -> None:
    """Validate the configuration, then plan (`dry_run=true`) or train."""
    hydra_config = HydraConfig.get()
    add_homes_of(hydra_config.runtime.config_sources)
    if composed.run.name is None:
        name = hydra_config.job.config_name
        composed.run.name = run_name(composed, hydra_config.overrides.task, config_name=name)
    config = spend(typed(composed))
    world_size = environment_world_size()
    if config.dry_run:
        from lrtrain.planning.plan import print_plan

        if environment_rank() == 0:
            print_plan(config, world_size)
        return
    if environment_rank() == 0:  # if this fails, the others wait at the rendezvous until torchrun ends them
        check(config, world_size)
        check_directories(config)
        check_data(config.data)
    from lrtrain.run.loop import pretrain

    pretrain(config)


def fail(error: BaseException, message: str, code: int) -> None:
    """Print a message, by the first process that has it, and end this process."""
    if SHOW_TRACEBACKS:
        raise error
    if first_to_say(message):
        print(message, file=sys.stderr, flush=True)
        note_failure(message)
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads of the process group


def note_failure(message: str) -> None:
    """Write the message to the file in which the parent (a sweep or torchrun, which prints it in its report) looks for
    it."""
    if note := os.environ.get(FAILURE):
        Path(note).write_text(message)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))


if __name__ == "__main__":
    # DeepSpeed's launcher passes it here, besides the environment.
    sys.argv = [argument for argument in sys.argv if not argument.startswith(("--local_rank=", "--local-rank="))]
    try:
        search_homes()
        main()
    except (HydraException, OmegaConfBaseException) as error:
        fail(error, composition_sentence(error), code=2)
    except ConfigError as error:
        fail(error, str(error), code=2)
    except ValueError as error:
        if "Config group override" not in str(error):  # Hydra's, for param=null
            raise
        fail(error, "a choice of conf/ is null; name one, as in param=lowrank, or leave the override out", code=2)
    except SweepFailed:
        sys.exit(1)
    except KeyboardInterrupt as error:
        fail(error, "interrupted", code=130)
