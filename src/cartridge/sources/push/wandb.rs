//! Into a run of Weights & Biases, which is made if there is none.

use serde_json::{Value, json};
use ureq::http::Method;

use super::Piece;
use crate::cartridge::{
    CartridgeError,
    sources::{
        Wandb,
        cached::Fetch,
        transfer::{Failure, Request, Transfer},
    },
};

const UPSERT: &str = "mutation UpsertBucket($entity: String, $project: String, $name: String, \
    $config: JSONString, $summary: JSONString) { upsertBucket(input: {entityName: $entity, modelName: \
    $project, name: $name, config: $config, summaryMetrics: $summary}) { bucket { name project { name \
    entity { name } } } inserted } }";
const CREATE: &str = "mutation CreateRunFiles($entity: String!, $project: String!, $run: String!, \
    $files: [String!]!) { createRunFiles(input: {entityName: $entity, projectName: $project, runName: \
    $run, files: $files}) { runID uploadHeaders files { name uploadUrl } } }";
const MARK: &str = "mutation MarkRunFilesUploaded($entity: String!, $project: String!, $run: String!, \
    $files: [String!]!) { markRunFilesUploaded(input: {entityName: $entity, projectName: $project, \
    runName: $run, files: $files}) { success } }";

impl Wandb {
    /// Publishes `pieces` as files of a run, with facts for its configuration and its summary (JSON objects).
    ///
    /// # Errors
    /// [`CartridgeError::InvalidId`], [`CartridgeError::SourceUnavailable`], [`CartridgeError::NotFound`] if the
    /// project or entity cannot be written to.
    pub fn push(
        &self,
        id: &str,
        pieces: &[Piece],
        (config, summary): (&Value, &Value),
        transfer: &Transfer,
    ) -> Result<String, CartridgeError> {
        let run = self.parse(id)?;
        self.check_ready(id)?;
        let deadline = transfer.deadline();
        let told = |failure| self.told(id, failure);
        let malformed = |reason: &str| {
            told(Failure::Malformed { host: "the server".to_owned(), reason: reason.to_owned() })
        };
        let wrapped = config.as_object().into_iter().flatten();
        let wrapped: serde_json::Map<_, _> = wrapped
            .map(|(key, value)| (key.clone(), json!({"value": value, "desc": null})))
            .collect();
        let variables = json!({
            "entity": run.entity, "project": run.project, "name": run.run,
            "config": Value::Object(wrapped).to_string(), "summary": summary.to_string(),
        });
        // By name: doing it twice changes nothing.
        let made = self.graphql(transfer, (UPSERT, &variables), true, deadline).map_err(told)?;
        if !made["upsertBucket"]["bucket"].is_object() {
            return Err(malformed("it made no run"));
        }
        let names: Vec<&str> = pieces.iter().map(|piece| piece.name.as_str()).collect();
        let place = json!({
            "entity": run.entity, "project": run.project, "run": run.run, "files": names,
        });
        let reply = self.graphql(transfer, (CREATE, &place), true, deadline).map_err(told)?;
        let reply = &reply["createRunFiles"];
        let headers: Vec<(String, String)> = reply["uploadHeaders"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|header| header.as_str()?.split_once(':'))
            .map(|(name, value)| (name.trim().to_lowercase(), value.trim().to_owned()))
            .collect();
        let files = reply["files"].as_array().map_or(&[][..], Vec::as_slice);
        for piece in pieces {
            let file = files.iter().find(|file| file["name"] == *piece.name);
            let url = file.and_then(|file| file["uploadUrl"].as_str());
            let url = url.ok_or_else(|| malformed("it gives no address for an upload"))?;
            let request = self.file_request(url).map_err(malformed)?;
            let request = Request { headers: headers.clone(), ..request };
            let content = piece.part(0, piece.size);
            transfer.send(&Method::PUT, &request, content, true, deadline).map_err(told)?;
        }
        // Servers of one's own want to be told; others do not know the word, and need not be.
        if let Err(failure) = self.graphql(transfer, (MARK, &place), true, deadline) {
            tracing::debug!(%failure, "markRunFilesUploaded");
        }
        Ok(run.to_string())
    }
}
