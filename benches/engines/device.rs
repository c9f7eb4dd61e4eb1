//! The kernels on a device: launches between two waits, compiling left out, nothing copied.

use std::time::Instant;

use delta_rule::cubecl::future::block_on;
use delta_rule::cubecl::prelude::*;
use delta_rule::cubecl::std::tensor::TensorHandle;
use delta_rule::gpu::{DTypes, DeviceInputs, DeviceOutputGradients, backward, client, forward, forward_into};
use delta_rule::{Ident, Options};

use super::{Data, Engine, Pass};

/// `None`, said aloud, where there is no such device or it refuses the problem.
pub(crate) fn engine<'a, R: Runtime>(name: &'static str, data: &'a Data, pass: Pass) -> Option<Engine<'a>> {
    let skip = |e: delta_rule::Error| eprintln!("SKIPPED {name}: {e}");
    let client = client::<R>(&Default::default()).map_err(skip).ok()?;
    let problem = &data.problem;
    let f32 = f32::as_type_native_unchecked().storage_type();
    let upload = |ident: Ident, x: &[f32]| {
        let handle = client.create_from_slice(f32::as_bytes(x));
        TensorHandle::<R>::new_contiguous(problem.shape_of(ident), handle, f32)
    };
    let (q, k) = (upload(Ident::Q, &data.q), upload(Ident::K, &data.k));
    let (v, beta) = (upload(Ident::V, &data.v), upload(Ident::Beta, &data.beta));
    let g = data.g.as_ref().map(|g| upload(Ident::G, g));
    let inputs = move || DeviceInputs {
        g: g.clone().map(|g| g.binding()),
        ..DeviceInputs::new(
            q.clone().binding(),
            k.clone().binding(),
            v.clone().binding(),
            beta.clone().binding(),
        )
    };
    let options = Options::new();
    let out = forward(&client, problem, &options, inputs(), DTypes::all(f32)).map_err(skip).ok()?;
    let d_o = upload(Ident::O, &data.d_o);
    let run = move |n| {
        block_on(client.sync()).expect("the device works");
        let start = Instant::now();
        for _ in 0..n {
            if pass.goes_forward() {
                let (o, state) = (out.o.clone().binding(), out.final_state.clone().binding());
                forward_into(&client, problem, &options, inputs(), DTypes::all(f32), o, state)
                    .expect("a valid call");
            }
            if pass.goes_back() {
                let upstream = DeviceOutputGradients { o: d_o.clone().binding(), final_state: None };
                backward(&client, problem, &options, inputs(), upstream, DTypes::all(f32))
                    .expect("a valid call");
            }
        }
        block_on(client.sync()).expect("the device works");
        start.elapsed()
    };
    Some(Engine { name, run: Box::new(run) })
}
