"""Privacy bugs, each a change of a line or two of the package, and the test that notices it."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """A bug.

    Attributes:
        name: What goes wrong, in words.
        file: Where, below `dpsgd/`.
        before: The right code, which occurs once.
        after: The wrong code.
        test: The test that must fail.
    """

    name: str
    file: str
    before: str
    after: str
    test: str


T1 = "tests/privacy/test_t1_sensitivity.py::"
POLICIES = "tests/privacy/test_t1_policies.py::"
T2 = "tests/privacy/test_t2_noise.py::"
T3 = "tests/privacy/test_t3_sampling.py::"
OTHERS = "tests/privacy/test_t3_other_samplers.py::"
ROUTES = "tests/engines/test_agreement.py::test_every_route_of_the_ghost_engine_agrees"
RESUMING = "tests/test_resuming.py::"
T8 = "tests/privacy/test_t8_leaks.py::"
STEPS = "tests/parallel/test_steps.py::"

NOISE = "flat[place : place + len(noise)].add_(noise.to(flat), alpha=std)"
HOSTILE = T1 + "test_a_hostile_vector_moves_the_release_by_at_most_c[{}-float32]"
VARIANCE = T2 + "test_every_tensor_of_every_step_has_the_planned_variance"

MUTATIONS = [
    Mutation("no noise", "noise.py", NOISE, NOISE.replace("alpha=std", "alpha=0.0"), VARIANCE),
    Mutation("half the noise", "noise.py", NOISE, NOISE.replace("=std", "=std / 2"), VARIANCE),
    Mutation(
        "0.95 times the noise", "noise.py", NOISE, NOISE.replace("=std", "=0.95 * std"), VARIANCE
    ),
    Mutation(
        "the same noise in every step",
        "noise.py",
        'rng.derive(self._key, "noise", step)',
        'rng.derive(self._key, "noise", 0)',
        T2 + "test_steps_tensors_and_neighbours_are_uncorrelated",
    ),
    Mutation(
        "the same noise in every tensor",
        "noise.py",
        "self._normals.pieces(key, start, total.numel())",
        "self._normals.pieces(key, 0, total.numel())",
        T2 + "test_noise_depends_on_the_flat_position_only",
    ),
    Mutation(
        "a step's noise twice",
        "noise.py",
        "if step < self._used_below or step in self._used:",
        "if False:",
        T2 + "test_a_step_used_twice_is_refused",
    ),
    Mutation(
        "noise from a seed of 32 bits",
        "rng.py",
        "    return secrets.token_bytes(KEY_BYTES)",
        "    return int(torch.initial_seed() % 2**32).to_bytes(KEY_BYTES, 'big')",
        T2 + "test_torch_seeds_do_not_move_the_noise",
    ),
    Mutation(
        "no clipping",
        "clipping/base.py",
        "usable((bounds / norms).clamp(max=1), norms)",
        "usable(torch.ones_like(norms), norms)",
        HOSTILE.format("hooks-huge"),
    ),
    Mutation(
        "clipping by the mean norm",
        "private_step.py",
        "clipping(norms) * counted",
        "clipping(norms.mean(0, keepdim=True).expand_as(norms)) * counted",
        HOSTILE.format("hooks-large"),
    ),
    Mutation(
        "division by the drawn batch size",
        "private_step.py",
        "clipping(norms) * counted",
        "clipping(norms) * counted / counted.sum() * self.expected_batch_size",
        HOSTILE.format("hooks-ordinary"),
    ),
    Mutation(
        "padding rows count",
        "private_step.py",
        "            weights = clipping(norms) * counted\n",
        "            weights = clipping(norms)\n",
        "tests/test_trainer.py::test_the_result_does_not_depend_on_the_physical_batch_size",
    ),
    Mutation(
        "clip factors in bfloat16",
        "private_step.py",
        "clipping(norms) * counted",
        "clipping(norms).bfloat16().to(norms.dtype) * counted",
        T1 + "test_a_hostile_vector_moves_the_release_by_at_most_c",
    ),
    Mutation(
        "a gradient that is not finite passes the clip",
        "clipping/base.py",
        "torch.where(good.all(1, keepdim=True), weights, torch.zeros_like(weights))",
        "torch.nan_to_num(weights, nan=1.0)",
        HOSTILE.format("hooks-nan"),
    ),
    Mutation(
        "norms without biases",
        "engines/grads.py",
        "[squares[name] for name in group]",
        "[squares[name] for name in group if 'bias' not in name or len(group) == 1]",
        HOSTILE.format("hooks-ordinary"),
    ),
    Mutation(
        "ghost norms without the cross terms of a tied weight",
        "engines/ghost/part.py",
        "if len(uses) == 1 or disjoint([use.source for use in uses]):",
        "if True:",
        ROUTES,
    ),
    Mutation(
        "ghost norms that cancel are believed",
        "rules/rows.py",
        "        doubtful = ~((sure >= _TINY) & torch.isfinite(total))",
        "        doubtful = ~torch.isfinite(total)",
        "tests/engines/test_ghost.py::test_cancelling_tokens_do_not_hide_a_gradient",
    ),
    Mutation(
        "a weight used outside its layer is missed",
        "engines/hooks.py",
        '    if missed:\n        raise ValueError(\n            f"The losses use',
        '    if False:\n        raise ValueError(\n            f"The losses use',
        "tests/engines/test_adversarial.py::test_a_parameter_reached_by_reference_is_noticed",
    ),
    Mutation(
        "sums left over from an aborted step",
        "private_step.py",
        "        except BaseException:\n            self.discard()\n            raise",
        "        except BaseException:\n            raise",
        "tests/test_private_step.py::test_an_error_discards_the_sums_of_the_step",
    ),
    Mutation(
        "layers clipped to C each",
        "clipping/groups.py",
        "self.max_grad_norm / math.sqrt(norms.shape[1])",
        "self.max_grad_norm",
        POLICIES + "test_a_record_moves_sum_and_statistic_by_at_most_the_bound",
    ),
    Mutation(
        "the count of adaptive clipping is not part of the bound",
        "clipping/adaptive.py",
        "return self.max_grad_norm * math.sqrt(1 + self.count_share**2)",
        "return self.max_grad_norm",
        POLICIES + "test_a_record_moves_sum_and_statistic_by_at_most_the_bound",
    ),
    Mutation(
        "adaptive clipping learns from the count without noise",
        "private_step.py",
        "released = sums if statistic is None else {**sums, _STATISTIC: statistic}",
        "released = sums",
        POLICIES + "test_the_count_of_an_adaptive_policy_is_part_of_the_release",
    ),
    Mutation(
        "the noise does not follow a schedule of C",
        "private_step.py",
        "noise_multiplier * clipping.sensitivity, step, offsets)",
        "noise_multiplier * self.clipping.sensitivity, step, offsets)",
        POLICIES + "test_the_noise_follows_a_schedule_of_c_and_of_sigma",
    ),
    Mutation(
        "records drawn too often",
        "sampling/poisson.py",
        "math.log1p(-q)",
        "math.log1p(-1.02 * q)",
        T3 + "test_inclusions_are_binomial_and_batch_sizes_vary_as_they_should",
    ),
    Mutation(
        "the same draw in every step",
        "sampling/poisson.py",
        'rng.derive(self.key, "sampling", step)',
        'rng.derive(self.key, "sampling", 0)',
        T3 + "test_steps_are_independent",
    ),
    Mutation(
        "a batch of fixed size",
        "sampling/poisson.py",
        "        return positions[positions >= start]",
        "        return torch.randperm(stop)[: round(q * stop)].sort().values",
        T3 + "test_inclusions_are_binomial_and_batch_sizes_vary_as_they_should",
    ),
    Mutation(
        "an empty batch is skipped",
        "trainer.py",
        "        self.step.release()\n",
        "        if len(drawn):\n            self.step.release()\n        else:\n"
        "            self.step.step += 1\n",
        T3 + "test_empty_batches_happen_and_are_noised_stepped_and_charged",
    ),
    Mutation(
        "another rate is accounted for than is drawn",
        "sampling/poisson.py",
        "poisson_releases(rate, [run])",
        "poisson_releases(rate / 2, [run])",
        "tests/test_account.py::test_a_plan_is_accounted_for_without_data",
    ),
    Mutation(
        "shuffled batches accounted as Poisson",
        "sampling/shuffled.py",
        "        return gaussian_releases(list(runs.items()))",
        "        from dpsgd.accounting.releases import poisson_releases\n\n"
        "        return poisson_releases(self.rate, noise)",
        OTHERS + "test_shuffling_is_charged_a_gaussian_per_begun_epoch_and_no_amplification",
    ),
    Mutation(
        "truncation is free",
        "sampling/truncated.py",
        "        assert self.public_size is not None\n        each = (",
        "        return super().releases(noise, start)\n        each = (",
        OTHERS + "test_truncation_costs_more_than_poisson_and_little_when_it_is_rare",
    ),
    Mutation(
        "replace-one accounted as add/remove",
        "accounting/spending.py",
        '"replace_one": NeighboringRelation.REPLACE_ONE',
        '"replace_one": NeighboringRelation.ADD_OR_REMOVE_ONE',
        "tests/test_accounting.py::test_replacing_a_record_costs_more_than_adding_one",
    ),
    Mutation(
        "a combination without a theorem is accepted",
        "plan.py",
        "    if (adjacency, accountant) not in sampler.theorems:",
        "    if False:",
        OTHERS + "test_only_combinations_with_a_theorem_make_a_plan",
    ),
    Mutation(
        "calibration overshoots the target",
        "accounting/calibration.py",
        "if target * (1 - _TOLERANCE) <= now <= target:\n            return noise",
        "if target * (1 - _TOLERANCE) <= now <= target * (1 + 9 * _TOLERANCE):\n"
        "            return noise",
        "tests/test_accounting.py::test_calibration_reaches_the_target_and_never_overshoots",
    ),
    Mutation(
        "a step is charged after it happened",
        "trainer.py",
        "                if ledger is not None:\n"
        "                    ledger.intend(number, self.plan.noise_at(number))\n"
        "                contributions, drawn = self._take(number)\n",
        "                contributions, drawn = self._take(number)\n"
        "                if ledger is not None:\n"
        "                    ledger.intend(number, self.plan.noise_at(number))\n",
        "tests/test_ledger.py::test_the_charge_is_on_disk_before_the_step_draws",
    ),
    Mutation(
        "an edited ledger passes",
        "ledger.py",
        "if not hmac.compare_digest(expected.encode(), mac.encode()):",
        "if False:",
        "tests/test_ledger.py::test_an_edited_ledger_is_noticed",
    ),
    Mutation(
        "a sweep is charged like one run",
        "sweeps.py",
        "                events[event] += count",
        "                events[event] = count",
        "tests/test_account.py::test_a_sweep_is_charged_by_composition",
    ),
    Mutation(
        "a private metric is logged",
        "loggers.py",
        '        "optimizer/learning_rate": report.learning_rate,',
        '        "optimizer/learning_rate": report.learning_rate,\n'
        '        "train/loss": report.private.get("train_loss", 0.0),',
        T8 + "test_public_files_do_not_depend_on_private_records",
    ),
    Mutation(
        "the drawn batch size is published as speed",
        "loggers.py",
        '        "privacy/epsilon": report.epsilon,',
        '        "privacy/epsilon": report.epsilon,\n'
        '        "speed/records": report.private.get("drawn_batch_size", 0.0),',
        T8 + "test_public_files_do_not_depend_on_private_records",
    ),
    Mutation(
        "a fixed key is written to the configuration",
        "config.py",
        'copy.privacy.key = "<redacted>"',
        "pass",
        "tests/test_configs.py",
    ),
    Mutation(
        "samples that influence each other are accepted",
        "checks/preflight.py",
        "    check_independence(engine.model, engine.loss_fn, batch)\n",
        "",
        "tests/test_checks.py::test_batch_normalisation_is_refused_in_every_disguise",
    ),
    Mutation(
        "batch statistics move without noise",
        "private_step.py",
        "            check_no_batch_statistics(self.engine.model)\n",
        "",
        "tests/test_private_step.py::test_batch_statistics_are_refused_whatever_the_engine",
    ),
    Mutation(
        "users bring more records than they may, as units of their own",
        "losses.py",
        "        return total / counted.sum(1).clamp(min=1)",
        "        return total",
        POLICIES + "test_a_users_loss_is_the_mean_over_its_records",
    ),
    Mutation(
        "an attempt forgets what other attempts have spent",
        "resuming.py",
        "    return Budget(plan, others, own[0] if own else start.checkpoint.step)",
        "    return Budget(plan, (), 0)",
        RESUMING + "test_every_attempt_keeps_to_the_budget_also_when_it_is_resumed",
    ),
    Mutation(
        "another learning rate is replayed with the same noise",
        "resuming.py",
        'for kind in ("conditions", "settings")',
        'for kind in ("conditions",)',
        RESUMING + "test_what_cannot_be_exact_is_a_new_attempt",
    ),
    Mutation(
        "other records are trained on as if they were the same",
        "resuming.py",
        'if before["records"] != now["records"] and not allow_new_data:',
        "if False:",
        RESUMING + "test_other_records_are_refused_unless_they_are_wanted",
    ),
    Mutation(
        "the guarantee of a run changes under way",
        "resuming.py",
        '    _check_settings(charged.plan.get("settings", {}), config)\n',
        "",
        RESUMING + "test_an_edited_configuration_does_not_change_the_guarantee",
    ),
    Mutation(
        "a copy of a run goes on with its noise",
        "resuming.py",
        'if before["path"] != now["path"] and before["inode"] != now["inode"]:',
        "if False:",
        RESUMING + "test_a_copy_forks_and_a_moved_directory_does_not",
    ),
    Mutation(
        "a ledger may lose the lines that a checkpoint has seen",
        "ledger.py",
        "if head is not None and not lines.head_seen:",
        "if False:",
        RESUMING + "test_a_ledger_that_does_not_fit_is_refused",
    ),
    Mutation(
        "an edited checkpoint is loaded",
        "checkpoint.py",
        "if not hmac.compare_digest(mac, self._mac(text)):",
        "if False:",
        "tests/faults/test_damage.py::test_a_checkpoint_of_another_run_is_not_loaded",
    ),
    Mutation(
        "dropout of a replayed step differs",
        "trainer.py",
        "                    seed_step(self.seed, number, self.step.parallel.world.rank)",
        "                    pass",
        RESUMING + "test_a_run_that_was_asked_to_stop_ends_like_any_other",
    ),
    Mutation(
        "the key outlives the run",
        "run_directory.py",
        "        destroy_key(self.private / KEY)\n",
        "        pass\n",
        "tests/test_train.py::test_private_things_are_in_the_locked_drawer_only",
    ),
    Mutation(
        "processes average their sums",
        "parallel/world.py",
        "                dist.all_reduce(tensor)\n",
        "                dist.all_reduce(tensor)\n                tensor.div_(self.size)\n",
        STEPS + "test_weights_are_those_of_one_process[blocks-ddp]",
    ),
    Mutation(
        "every process takes the whole draw",
        "parallel/base.py",
        "return drawn[self.world.rank :: self.world.size]",
        "return drawn",
        "tests/parallel/test_command_line.py::test_several_processes_train_what_one_trains"
        "[ddp-2-float32-1e-06]",
    ),
    Mutation(
        "every part of a parameter gets the noise of the first",
        "parallel/sharded.py",
        "offsets[name] = places[name] + part.first * _row_size(p)",
        "offsets[name] = places[name]",
        STEPS + "test_each_process_draws_the_noise_of_its_part_alone",
    ),
    Mutation(
        "names of parameters are known from before the forward pass alone",
        "engines/sharding.py",
        "if self.sharded and any(id(leaf) not in self._known for leaf in leaves(weight)):",
        "if False:",
        STEPS + "test_a_sharded_model_has_the_norms_of_the_whole_one[blocks]",
    ),
    Mutation(
        "processes may have noise of their own",
        "private_step.py",
        '"key of the noise": self.noise.name,',
        '"key of the noise": "",',
        STEPS + "test_what_cannot_work_is_refused_on_every_process[key]",
    ),
    Mutation(
        "unit-norm gradients get the noise of a smaller clip norm",
        "clipping/flat.py",
        '"""1, whatever C is."""\n        return 1.0',
        '"""1, whatever C is."""\n        return min(1.0, self.max_grad_norm)',
        POLICIES
        + "test_a_record_moves_sum_and_statistic_by_at_most_the_bound[ghost-unit_norm-huge]",
    ),
    Mutation(
        "steps of a growing batch are charged at the rate of the first",
        "sampling/poisson.py",
        "for factor, sigma, count in self.factors.split(noise, start):",
        "for factor, sigma, count in self.factors.split(noise, 0 * start):",
        "tests/test_batch_schedule.py::test_repeated_steps_are_charged_at_their_own_rates",
    ),
    Mutation(
        "a sample that is not finite may silence the others",
        "checks/preflight.py",
        "    check_containment(engine, batch)\n",
        "",
        "tests/test_checks.py::test_an_engine_that_lets_nan_spread_is_refused",
    ),
]
