use cubecl::prelude::*;
use delta_rule::gpu::*;
use delta_rule::*;
fn naive(p: &Problem, o: &Options, x: &Inputs<f32>) -> (Vec<f64>, Vec<f64>) {
    let s = p.shape(); let nh = p.rule().micro_steps; let (kd, vd) = (s.key_dim, s.value_dim);
    let mut out = vec![0.0; p.len_of(Ident::O)]; let mut fs = vec![0.0; p.len_of(Ident::FinalState)];
    for n in 0..p.sequences() { let sq = p.sequence(n); for hv in 0..s.value_heads { let h = p.key_head(hv);
        let sb = (n * s.value_heads + hv) * kd * vd;
        let mut st: Vec<f64> = match x.initial_state { Some(h0) => h0[sb..sb + kd * vd].iter().map(|&x| x as f64).collect(), None => vec![0.0; kd * vd] };
        for t in 0..sq.len { let tok = sq.row * s.tokens + sq.start + t;
            if let Some(g) = x.g { for i in 0..kd { let gi = if p.gate_dim() == 1 { g[tok * s.value_heads + hv] } else { g[(tok * s.value_heads + hv) * kd + i] } as f64; for j in 0..vd { st[i * vd + j] *= gi.exp(); } } }
            for m in 0..nh { let r = tok * nh + m; let k = &x.k[(r * s.heads + h) * kd..][..kd]; let v = &x.v[(r * s.value_heads + hv) * vd..][..vd]; let b = x.beta[r * s.value_heads + hv] as f64;
                for j in 0..vd { let mut d = 0.0; for i in 0..kd { d += st[i * vd + j] * k[i] as f64; } let u = b * (v[j] as f64 - d); for i in 0..kd { st[i * vd + j] += k[i] as f64 * u; } } }
            let q = &x.q[(tok * s.heads + h) * kd..][..kd];
            for j in 0..vd { let mut d = 0.0; for i in 0..kd { d += st[i * vd + j] * q[i] as f64; } out[(tok * s.value_heads + hv) * vd + j] = d * o.scale_for(kd); } }
        fs[sb..sb + kd * vd].copy_from_slice(&st); } }
    (out, fs)
}
fn err(a: &[f32], b: &[f64]) -> f64 { let e: f64 = a.iter().zip(b).map(|(&x, &y)| (x as f64 - y).powi(2)).sum(); let r: f64 = b.iter().map(|y| y * y).sum(); (e / r).sqrt() }
fn run<R: Runtime>(client: &ComputeClient<R>) {
    let mut seed = 1u64; let mut rnd = move || { seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); ((seed >> 40) as f32 / (1 << 24) as f32) * 2.0 - 1.0 };
    for (rule, shape, cu, bmax, gs) in [
        (Rule::deltanet(), Shape { batch: 1, tokens: 5, heads: 1, value_heads: 1, key_dim: 32, value_dim: 32 }, None, 1.0, 0.0),
        (Rule::deltanet(), Shape { batch: 2, tokens: 99, heads: 1, value_heads: 2, key_dim: 64, value_dim: 32 }, None, 2.0, 0.0),
        (Rule::gated_deltanet(), Shape { batch: 1, tokens: 99, heads: 1, value_heads: 2, key_dim: 100, value_dim: 60 }, Some(vec![0usize, 0, 33, 99]), 2.0, 1.0),
        (Rule::kda(), Shape { batch: 1, tokens: 70, heads: 2, value_heads: 2, key_dim: 61, value_dim: 33 }, None, 1.0, 50.0),
        (Rule::delta_product(2), Shape { batch: 1, tokens: 70, heads: 1, value_heads: 1, key_dim: 64, value_dim: 64 }, None, 2.0, 0.0),
        (Rule::gated_delta_product(3), Shape { batch: 1, tokens: 70, heads: 1, value_heads: 1, key_dim: 128, value_dim: 64 }, None, 2.0, 0.3),
        (Rule::kda(), Shape { batch: 1, tokens: 70, heads: 1, value_heads: 1, key_dim: 256, value_dim: 256 }, None, 1.0, 0.1),
    ] {
        let mut p = Problem::new(rule, shape).unwrap(); if let Some(cu) = cu { p = p.with_cu_seqlens(&cu).unwrap(); }
        let mut mk = |i: Ident| -> Vec<f32> { (0..p.len_of(i)).map(|_| rnd()).collect() };
        let (q, mut k, v) = (mk(Ident::Q), mk(Ident::K), mk(Ident::V));
        for row in k.chunks_mut(shape.key_dim) { let n = row.iter().map(|x| x * x).sum::<f32>().sqrt(); row.iter_mut().for_each(|x| *x /= n); }
        let beta: Vec<f32> = mk(Ident::Beta).iter().map(|x| (x + 1.0) * bmax / 2.0).collect();
        let g: Vec<f32> = mk(Ident::G).iter().map(|x| -(x + 1.0) * gs).collect();
        let h0 = mk(Ident::InitialState);
        let o = match std::env::var("C") { Ok(c) => Options::new().with_chunk_size(c.parse().unwrap()), _ => Options::new() };
        let x = Inputs { g: (rule.decay != Decay::None).then_some(&g[..]), initial_state: Some(&h0), ..Inputs::new(&q, &k, &v, &beta) };
        let want = naive(&p, &o, &x);
        let t = std::time::Instant::now(); if let Ok(n) = std::env::var("ONLY") { if n != format!("{}", shape.tokens) { continue; } }
        match forward_host(client, HostDType::F32, &p, &o, &x) { Ok(got) => println!("{rule:?} {shape:?}: o {:.1e} state {:.1e} {:?}", err(&got.o, &want.0), err(&got.final_state, &want.1), t.elapsed()), Err(e) => println!("{rule:?}: {e}") }
    }
}
fn main() { 
    let what = std::env::args().nth(1).unwrap_or("wgpu".into()); let b = std::env::args().nth(2).is_some();
    if what == "wgpu" { let client = cubecl::wgpu::WgpuRuntime::client(&cubecl::wgpu::WgpuDevice::DefaultDevice); if b { bench(&client, "wgpu") } else { run(&client); } }
    #[cfg(feature = "cuda")]
    if what == "cuda" { let client = cubecl::cuda::CudaRuntime::client(&Default::default()); if b { bench(&client, "cuda") } else { run(&client); } }
}
fn bench<R: Runtime>(client: &ComputeClient<R>, name: &str) {
    for (rule, rn) in [(Rule::deltanet(), "dn"), (Rule::gated_deltanet(), "gdn"), (Rule::kda(), "kda"), (Rule::delta_product(2), "dp2")] {
        if std::env::var("RULES").map_or(false, |r| !r.contains(rn)) { continue; }
        for (b, t, h) in [(8usize, 2048usize, 32usize), (1, 8192, 32)] {
        let shape = Shape { batch: b, tokens: t, heads: h, value_heads: h, key_dim: 128, value_dim: 128 };
        let p = Problem::new(rule, shape).unwrap();
        let f = f32::as_type_native_unchecked().storage_type();
        let mk = |i: Ident, s: f32, off: f32| { let n = p.len_of(i); let mut seed = 7u32; let v: Vec<f32> = (0..n).map(|_| { seed = seed.wrapping_mul(1664525).wrapping_add(1013904223); ((seed >> 8) as f32 / (1 << 24) as f32 - 0.5) * s + off }).collect();
            cubecl::std::tensor::TensorHandle::<R>::new_contiguous(p.shape_of(i), client.create_from_slice(f32::as_bytes(&v)), f) };
        let (q, k, v, beta, g) = (mk(Ident::Q, 0.3, 0.), mk(Ident::K, 0.3, 0.), mk(Ident::V, 2., 0.), mk(Ident::Beta, 1., 0.5), mk(Ident::G, 0.1, -0.05));
        let ins = || DeviceInputs { g: (rule.decay != Decay::None).then(|| g.clone().binding()), ..DeviceInputs::new(q.clone().binding(), k.clone().binding(), v.clone().binding(), beta.clone().binding()) };
        let out = forward(client, &p, &Options::new(), ins(), DTypes::all(f)).unwrap();
        cubecl::future::block_on(client.sync()).unwrap();
        let mut best = f64::MAX;
        for _ in 0..3 { let s = std::time::Instant::now(); let n = 5; for _ in 0..n { forward_into(client, &p, &Options::new(), ins(), DTypes::all(f), out.o.clone().binding(), out.final_state.clone().binding()).unwrap(); }
            cubecl::future::block_on(client.sync()).unwrap(); best = best.min(s.elapsed().as_secs_f64() / n as f64); }
        println!("{name} {rn} B{b} T{t} H{h}: {:.3} ms {:.2} ns/th", best * 1e3, best * 1e9 / (b * t * h) as f64);
        }
    }
}
