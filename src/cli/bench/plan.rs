//! From the options of `cartouche bench` to what is run; refuses those that contradict each other.

use super::super::CliError;
use super::{BenchArgs, ClientsArg, EndpointArg, PrefixArg, Scenario};
use crate::bench::{
    Amount, Api, Endpoint, Load, Plan, Prefix, PromptSource, Target, WorkloadOptions,
};
use crate::limits;

fn usage(message: &str) -> CliError {
    CliError::Usage(message.to_owned())
}

impl BenchArgs {
    pub(super) async fn plan(&self) -> Result<Plan, CliError> {
        let targets = self.target_list()?;
        let amount = match (self.seconds, self.requests) {
            (Some(seconds), _) => Amount::Seconds(seconds),
            (None, Some(requests)) => Amount::Requests(requests),
            (None, None) => Amount::Requests(if self.rates.is_empty() { 10 } else { 100 }),
        };
        let prompt_tokens = self.prompt_tokens.unwrap_or(match self.scenario {
            Scenario::Plain => 128,
            Scenario::Distinct | Scenario::Shared => 32,
        });
        let levels = self.levels(&targets, prompt_tokens).await?;
        let clients = levels.iter().map(|load| match load {
            Load::Closed { clients } => *clients,
            Load::Open { .. } => 1,
        });
        let prefix = self.prefix(clients.max().unwrap_or(1))?;
        Ok(Plan {
            targets,
            levels,
            amount,
            warmup: self.warmup,
            repeat: self.repeat,
            timeout_s: self.timeout,
            retry_429: self.retry_429,
            model: self.model.clone(),
            workload: WorkloadOptions {
                api: match self.endpoint {
                    EndpointArg::Chat => Api::Chat,
                    EndpointArg::Completions => Api::Completions,
                },
                prompt: match &self.prompt_file {
                    Some(path) => PromptSource::File { path: path.clone() },
                    None => PromptSource::Random { tokens: prompt_tokens },
                },
                prefix,
                output_tokens: self.output_tokens,
                exact_output: !self.allow_eos,
                temperature: self.temperature,
                seed: self.seed,
                same_prompt: self.same_prompt,
                extra_body: self.extra_body.as_deref().cloned().unwrap_or_default(),
            },
            raw: self.raw,
        })
    }

    fn target_list(&self) -> Result<Vec<Target>, CliError> {
        let mut named = self.targets.clone();
        if named.is_empty() {
            named.push(("server".to_owned(), self.url.clone()));
        }
        let mut targets: Vec<Target> = Vec::new();
        for (label, url) in named {
            if targets.iter().any(|target| target.label == label) {
                return Err(CliError::Usage(format!("--target: `{label}` is there twice")));
            }
            let endpoint = Endpoint::new(&url, self.api_key.as_deref())?;
            targets.push(Target { label, url, endpoint });
        }
        Ok(targets)
    }

    async fn levels(
        &self,
        targets: &[Target],
        prompt_tokens: usize,
    ) -> Result<Vec<Load>, CliError> {
        if !self.rates.is_empty() {
            let max_outstanding = self.max_outstanding;
            return Ok(self
                .rates
                .iter()
                .map(|&rate| Load::Open { rate, max_outstanding })
                .collect());
        }
        let mut levels = Vec::new();
        for clients in &self.clients {
            let clients = match clients {
                ClientsArg::Number(number) => *number,
                ClientsArg::Fill => self.clients_that_fill(targets, prompt_tokens).await?,
            };
            if clients > limits::MAX_BENCH_CLIENTS {
                let limit = limits::MAX_BENCH_CLIENTS;
                return Err(CliError::Usage(format!("--clients {clients} is over {limit}")));
            }
            levels.push(Load::Closed { clients });
        }
        if levels.is_empty() {
            levels.push(Load::Closed { clients: 1 });
        }
        Ok(levels)
    }

    /// (KV tokens − reserve) / (prefix + prompt + output), the paper's number of clients.
    async fn clients_that_fill(
        &self,
        targets: &[Target],
        prompt_tokens: usize,
    ) -> Result<usize, CliError> {
        let prefix_tokens = match (self.scenario, self.prefix_tokens) {
            (Scenario::Distinct, Some(tokens)) => tokens,
            _ => return Err(usage("--clients fill needs --scenario distinct and --prefix-tokens")),
        };
        let kv_tokens = match (self.kv_tokens, targets.first()) {
            (Some(tokens), _) => tokens,
            (None, Some(target)) => target.kv_tokens().await?,
            (None, None) => 0,
        };
        let each = prefix_tokens + prompt_tokens + self.output_tokens;
        match kv_tokens.saturating_sub(self.reserve) / each {
            0 => Err(CliError::Usage(format!(
                "--clients fill: {kv_tokens} KV tokens less {} do not hold one client of {each}",
                self.reserve
            ))),
            clients => Ok(clients),
        }
    }

    fn prefix(&self, clients: usize) -> Result<Prefix, CliError> {
        let names_cartridge = self.cartridge.is_some() || self.cartridges_file.is_some();
        let shared = match self.scenario {
            Scenario::Plain if self.prefix == PrefixArg::Cartridge || names_cartridge => {
                return Err(usage("cartridges need --scenario shared or distinct"));
            }
            Scenario::Plain if self.prefix_tokens.is_some() => {
                return Err(usage("--prefix-tokens needs --scenario shared or distinct"));
            }
            Scenario::Plain => return Ok(Prefix::None),
            Scenario::Distinct if !self.rates.is_empty() => {
                return Err(usage(
                    "--scenario distinct is about clients; use --clients, not --rate",
                ));
            }
            Scenario::Distinct => false,
            Scenario::Shared => true,
        };
        if self.prefix == PrefixArg::Text {
            if names_cartridge {
                return Err(usage("--cartridge needs --prefix cartridge"));
            }
            let tokens = self.prefix_tokens;
            let tokens = tokens.ok_or_else(|| usage("--prefix text needs --prefix-tokens"))?;
            return Ok(Prefix::Text { tokens, shared });
        }
        let source = self.cartridge_source.clone();
        let ids = match (&self.cartridge, &self.cartridges_file) {
            (Some(id), _) if shared => vec![id.clone()],
            (Some(pattern), _) if pattern.contains("{client}") => {
                (0..clients).map(|i| pattern.replace("{client}", &i.to_string())).collect()
            }
            (Some(_), _) => {
                return Err(usage("--scenario distinct needs {client} in --cartridge"));
            }
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| CliError::Io { path: path.clone(), source })?;
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
                let wanted = if shared { 1 } else { clients };
                let ids: Vec<String> = lines.map(str::to_owned).take(wanted).collect();
                if ids.len() < wanted {
                    let (have, path) = (ids.len(), path.display());
                    let message = format!("{path} names {have} cartridges for {wanted} clients");
                    return Err(CliError::Usage(message));
                }
                ids
            }
            (None, None) => {
                return Err(usage("--prefix cartridge needs --cartridge or --cartridges-file"));
            }
        };
        Ok(Prefix::Cartridge { ids, source })
    }
}
