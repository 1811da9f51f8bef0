"""Jobs of several processes in tests, as torchrun would start them."""

import signal

import torch
import torch.distributed as dist
from command_line import Done, Running


class Job:
    """A command under way in several processes.

    Args:
        arguments: After `python -m MODULE`, the same for all.
        processes: How many there are.
        different: By rank, keywords of `Running` for that process alone.
    """

    def __init__(self, *arguments, processes, cwd, different=None, **options):
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(processes):
            own = {**options, **(different or {}).get(rank, {})}
            variables = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
                **own.pop("variables", {}),
            }  # fmt: skip
            further = own.pop("arguments", ())
            self.processes.append(
                Running(*arguments, *further, cwd=cwd, variables=variables, **own)
            )

    def send(self, number=signal.SIGTERM):
        for process in self.processes:
            process.send(number)

    def wait(self, timeout=240):
        """What each process left behind."""
        return [process.wait(timeout) for process in self.processes]


def job(*arguments, processes, cwd, check=True, **options) -> list[Done]:
    """Runs a job to its end."""
    done = Job(*arguments, processes=processes, cwd=cwd, **options).wait()
    if check:
        for one in done:
            assert one.returncode == 0, one.stderr + one.stdout
    return done


def program(name, *arguments, processes, cwd):
    """Runs a function of `parallel_programs` in several processes; what each returned."""
    job(name, *arguments, processes=processes, cwd=cwd, module="parallel_programs")
    return [torch.load(cwd / f"{name}-{rank}.pt") for rank in range(processes)]
